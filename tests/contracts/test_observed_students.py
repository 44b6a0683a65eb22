"""Students of every observed miniature, from prompts and the teacher's own samples alone."""

import pytest
from contracts.cases import train_student
from contracts.exports import check_export, check_lora
from contracts.observed_teachers import OBSERVED

DATA_FREE = {
    "tdm": {}, "sid": {}, "dmd2": {"gan_weight": 0.0}, "progressive": {}, "lcm": {"steps": 2, "solver_steps": 48},
}  # fmt: skip
"""Methods that need no images, and one that learns from the teacher's samples, with their options."""


@pytest.mark.product
@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("name", OBSERVED)
def test_an_observed_teacher_has_students_of_methods_without_images(tmp_path, name, method):
    teacher = OBSERVED[name]()
    run = train_student(tmp_path, teacher, method, "adapter", options=DATA_FREE[method])
    assert not run.family.encodes_images
    run.family.prompts = teacher.prompts
    images = check_export(run)
    if (run.folder / "pipeline/lora").exists():
        check_lora(run, images)
    else:
        assert not run.family.loads_lora
