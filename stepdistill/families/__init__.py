"""Teacher families: everything specific to one kind of diffusers model, one file each.

There is no registry: every family's file in this folder is found, and
:func:`~stepdistill.families.loading.load_teacher` recognises a teacher by the network classes that it names.
"""
