"""Options that another option turns off: a value that nothing would read is refused with the option to set."""

import pytest

from stepdistill.files.schema import ConfigError, build
from stepdistill.methods import find_method


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ladd", {"r1_distance": 0.3}, "r1_distance: expected 0.1 without r1, got 0.3"),
        ("dmd", {"regression_weight": 2}, "regression_weight: expected 0.25 without pairs, got 2.0"),
        ("dmd", {"distance": "pixels"}, "distance: expected 'features' without pairs, got 'pixels'"),
        ("dmd2", {"anchor": 3}, "diversity: expected above 0 with anchor or anchor_steps, got 0"),
        ("dmd2", {"anchor_steps": 40}, "diversity: expected above 0 with anchor or anchor_steps, got 0"),
        (
            "tcd",
            {"adversarial": "softplus"},
            "adversarial: expected 'hinge' without adversarial_weight, got 'softplus'",
        ),
        ("sid", {"critic_weight": 0.1}, "critic_weight: expected 0.01 without gan_weight, got 0.1"),
        ("dmd2", {"gan_weight": 0, "critic_weight": 0.1}, "critic_weight: expected 0.01 without gan_weight, got 0.1"),
        ("cdm", {"augmentation_weight": 2}, "augmentation_weight: expected 1.0 without guidance, got 2.0"),
        ("scm", {"tangent": "jvp", "difference": 0.1}, "difference: expected 0.04 with tangent 'jvp', got 0.1"),
        ("rcm", {"tangent": "jvp", "difference": 0.1}, "difference: expected 0.04 with tangent 'jvp', got 0.1"),
        ("rcm", {"matching_weight": 0, "most_steps": 8}, "most_steps: expected 4 without matching_weight, got 8"),
        ("sana_sprint", {"tangent": "jvp", "difference": 0.1}, "difference: expected 0.04 with tangent 'jvp', got 0.1"),
        ("flowmap", {"target": "jvp", "slices": "two", "power": 1}, "power: expected 0.5 with slices 'two', got 1.0"),
        (
            "flowmap",
            {"target": "split", "warmup": 9},
            "warmup: expected 0 with target 'split', which has no derivative",
        ),
        ("flowmap", {"condition_dropout": 0.2}, "condition_dropout: expected 0.1 without velocity"),
        ("flowmap", {"alpha_least": 0.5}, "alpha_least: expected 0.0 without target 'alpha', got 0.5"),
        ("flowmap", {"guidance_mix": 0.5}, "guidance_mix: expected 0.0 without velocity 'data' and guidance, got 0.5"),
        ("flowmap", {"target": "shortcut", "to_clean": 0.5}, "to_clean: expected 0.2 with target 'shortcut', got 0.5"),
        ("flowmap", {"guidance_until": 0.8}, "guidance_until: expected 1.0 without guidance, got 0.8"),
        ("add", {"features": "x", "max_blocks": 2}, "max_blocks: expected 5 with features that are not the teacher's"),
        ("add", {"augment": False}, "augment: expected True with the teacher's features, got False"),
        ("add", {"distillation": 0, "weighting": "sds"}, "weighting: expected 'exponential' without distillation"),
        ("add", {"distillation": 0, "guidance_scale": 4}, "guidance_scale: expected 1.0 without distillation, got 4.0"),
        ("add", {"distillation": 0, "decoded": True}, "decoded: expected False without distillation, got True"),
        ("dmd2", {"split": True, "augmentation_levels": "full"}, "augmentation_levels: expected 'below' without split"),
        ("rcm", {"consistency_weight": 0, "tangent": "jvp"}, "tangent: expected 'auto' without consistency_weight"),
        ("rcm", {"consistency_weight": 0, "norm_floor": 1}, "norm_floor: expected 0.1 without consistency_weight"),
        ("cdm", {"matching_weight": 0, "off_trajectory_weight": 0}, "matching_weight: expected above 0 where no other"),
        (
            "cdm",
            {"guidance_scale": 3, "matching_weight": 0, "off_trajectory_weight": 0, "augmentation_weight": 0},
            "matching_weight: expected above 0 where no other term has a weight, got 0",
        ),
        ("ladd", {"steps": 1, "first_share": 0.2}, "first_share: expected 0.7 with one step, got 0.2"),
        ("ladd", {"steps": 1, "warmup": 9}, "warmup: expected 500 with one step, got 9"),
        (
            "imagine_flash",
            {"features": "x", "max_blocks": 2},
            "max_blocks: expected 5 with features that are not the teacher's, got 2",
        ),
        ("imagine_flash", {"augment": False}, "augment: expected True with the teacher's features, got False"),
        ("imagine_flash", {"shift_top": 0.5}, "shift_top: expected 0.95 without reconstruction 'shifted', got 0.5"),
        (
            "imagine_flash",
            {"features": "x", "scale": 2},
            "scale: expected 1.0 with features that are not the teacher's",
        ),
    ],
)
def test_an_option_that_another_turns_off_is_refused(method, options, message):
    with pytest.raises(ConfigError, match=f"^method: {message}"):
        build(find_method(method).Config, options, "method")
