"""Images on request: of pipelines, of running students, of training-free solvers."""
