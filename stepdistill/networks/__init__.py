"""Networks by role: full copies or adapters, seen through their schedule, recomputed, sharded, watched."""
