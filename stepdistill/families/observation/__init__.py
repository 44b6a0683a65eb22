"""What a pipeline's own call does with its network and its scheduler, seen from outside.

:mod:`~stepdistill.families.observation.watching` makes the call, :mod:`~stepdistill.families.observation.reading` says
what each argument is, and :mod:`~stepdistill.families.observation.noise` what the scheduler does.
:mod:`~stepdistill.families.observation.replay` repeats the network's calls with other states and times, and
:mod:`~stepdistill.families.observation.checking` holds that they are the pipeline's.
:mod:`stepdistill.families.observed` makes a family of it.
"""
