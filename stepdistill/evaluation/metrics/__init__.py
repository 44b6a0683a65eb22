"""Metrics: functions of feature matrices (N, d).

Features are made once, by :mod:`stepdistill.features`, so that one pass over the images serves every metric. They may
have any float type and lie on any device. Sums are in float64, because a Fréchet distance is a small difference of
large numbers. Random choices (subsets, splits, resampling) are drawn from a seed on the CPU, so that equal features
give equal numbers on every machine.

| function | measures | paper |
|---|---|---|
| `frechet.frechet_distance` | mean and covariance; biased by about 1/N | Heusel et al. 2017, arXiv 1706.08500 |
| `kernel.kernel_distance` | all moments up to 3; unbiased | Binkowski et al. 2018, arXiv 1801.01401 |
| `kernel.cmmd` | the whole distribution | Jayasumana et al. 2024, arXiv 2401.09603 |
| `manifold.precision_recall`, `.density_coverage` | fidelity and diversity | arXiv 1904.06991, 2002.09797 |
| `classifier.inception_score`, `.class_accuracy` | classes: certain and varied; as asked for | arXiv 1606.03498 |
| `diversity.within_class_spread` | mode collapse within a class | - |
| `words.adherence_values`, `.within_prompt_deviations` | what prompts ask for is there; variety within a prompt | - |
| `diversity.nearest_distance`, `.authenticity` | copies of training images | Alaa et al. 2022, arXiv 2102.08921 |
"""
