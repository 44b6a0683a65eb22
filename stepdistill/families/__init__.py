"""Teacher families: everything that is peculiar to one kind of diffusers model, one file each.

There is no registry: a family's file is found because it lies here, and the classes of networks it names are what
:func:`~stepdistill.families.loading.load_teacher` recognises a teacher by.
"""
