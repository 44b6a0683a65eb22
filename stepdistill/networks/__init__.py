"""Networks by role, as full copies or adapters, with gradient checkpointing, sharding and captured features."""
