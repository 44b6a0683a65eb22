"""The console: ``stepdistill train | generate | evaluate | compare | export | push | benchmark | report | demo``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from stepdistill.cli.failures import failures_as_sentences
from stepdistill.cli.flags import (
    check_flags_of_evaluate,
    check_flags_of_generate,
    flag_of_compile,
    flags_of_trust,
    trust_of,
)
from stepdistill.cli.sharing import check_flags_of_hub, flags_of_hub, flags_of_push, push, push_if_asked
from stepdistill.evaluation.metrics.table import METRICS
from stepdistill.files.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seed, in_range
from stepdistill.files.words import closest, shown, visible
from stepdistill.files.writing import check_new_file

COUNT, SEED, SCALE = in_range(PositiveInt), in_range(Seed), in_range(NonNegativeFloat)
LABEL = in_range(NonNegativeInt)
SAMPLES = in_range(Annotated[int, Range(at_least=2)])
"""Types of numeric flags."""

PROTOCOL_FLAGS = (
    ("num_samples", SAMPLES, "number of images to measure"),
    ("seed", SEED, "seed of the images"),
    ("metrics", str, " ".join(METRICS)),
    ("reference", str, "'embedded', 'faces', images, or .npz statistics"),
    ("features", str, "'embedded', 'faces', 'efficientnet', 'inception', a weights file, or a vision model"),
    ("resize", str, "how Inception's input is resized: adm, torch-fidelity, torchmetrics, clean"),
    ("clip", str, "'faces', or a CLIP's folder or hub id; for the metrics clip and cmmd"),
    ("attributes", str, "'faces', or the folder of an attribute reader; for the metric adherence"),
    ("size", COUNT, "resize and crop all images to a square of this side"),
    ("captions", str, "prompts: a file as for generate --prompt_file, or images with captions"),
    ("guidance_scale", SCALE, "1 is none, for --pipeline of Z-Image 0; default: the pipeline's own"),
    ("num_inference_steps", COUNT, "default: the pipeline's own"),
    ("rows", COUNT, "rows per call of the network; fewer need less memory"),
    ("precision", str, "fp32 or bf16"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; print one message and exit with code 2 for whatever is wrong with its input or the machine."""
    parser = make_parser()
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = re.findall(r"--\w+", args.parser.format_usage())
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{closest(unknown[0].partition('=')[0], flags)}")
    with failures_as_sentences(f"stepdistill {args.command}", getattr(args, "config", None)):
        args.run(args)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; flags have the names of those in the diffusers examples."""
    parser = argparse.ArgumentParser(
        prog="stepdistill", description="Distil many-step diffusion models into few steps."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    flags_of_train(add(commands, "train", train, "train a student; run the same command again to resume"))
    flags_of_generate(add(commands, "generate", generate, "sample an exported pipeline"))
    flags_of_evaluate(add(commands, "evaluate", evaluate, "measure a pipeline, a teacher, or a folder of images"))
    command = add(commands, "compare", compare, "tell which result is better, and whether by more than chance")
    command.add_argument("results", nargs="+", type=Path, help="two or more result files")
    flags_of_export(add(commands, "export", export, "export the student of a run's newest checkpoint"))
    flags_of_push(add(commands, "push", push, "upload an export to the Hugging Face hub"))
    command = add(commands, "benchmark", benchmark, "compare students with the teacher and training-free solvers")
    flags_of_table(command, "benchmark_fashion")
    command.add_argument("--time", action="store_true", help="measure the seconds of all rows again")
    flags_of_table(add(commands, "demo", demo, "distil a small teacher, measure the student, draw a picture"), "demo")
    command = add(commands, "report", report, "write one self-contained HTML page from result files")
    command.add_argument("results", nargs="+", help="result files (.json) of evaluate or benchmark")
    command.add_argument("--output", required=True, help="page to write (.html)")
    return parser


def flags_of_train(command: argparse.ArgumentParser) -> None:
    """Add the flags of ``stepdistill train``."""
    command.add_argument("--config", required=True, help="YAML file, see configs/")
    command.add_argument("--dry_run", action="store_true", help="only print the full configuration and a memory plan")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="override values of the file")


def flags_of_generate(command: argparse.ArgumentParser) -> None:
    """Add the flags of ``stepdistill generate``."""
    command.add_argument("--pipeline", required=True, help="folder of an exported pipeline")
    command.add_argument("--prompt", nargs="+", action="extend", default=[], help="one or more prompts, used in turn")
    command.add_argument("--prompt_file", help="more prompts: lines of text, .csv, .tsv, .json, .jsonl, or - for stdin")
    command.add_argument("--negative_prompt", help="what guidance steers away from; needs a guidance scale above 1")
    command.add_argument("--class_labels", type=LABEL, nargs="+", action="extend", help="in turn; default: all classes")
    command.add_argument("--num_images", type=COUNT, help="default: one per prompt if there are several, else 16")
    command.add_argument(
        "--num_inference_steps", type=COUNT, help="numbers other than the trained one may give worse images"
    )
    command.add_argument("--guidance_scale", type=SCALE, help="1 is none, for Z-Image 0; default: the student's own")
    command.add_argument("--batch_size", type=COUNT, default=100, help="changes only the speed")
    command.add_argument("--seed", type=SEED, default=0)
    flag_of_compile(command)
    command.add_argument("--compare", metavar="TEACHER", help="also show images of a teacher: 'teacher', or its folder")
    command.add_argument(
        "--compare_steps",
        type=COUNT,
        help="steps of that teacher, with DDIM (a flow: its own scheduler); default: 50",
    )
    command.add_argument(
        "--compare_guidance_scale", type=SCALE, help="guidance of that teacher; default: that of the training"
    )
    flags_of_trust(command)
    command.add_argument(
        "--output", required=True, nargs="+", action="extend", type=Path,
        help="a .png for a grid, a folder for single images, or both",
    )  # fmt: skip


def flags_of_evaluate(command: argparse.ArgumentParser) -> None:
    """Add the flags of ``stepdistill evaluate``."""
    subject = command.add_mutually_exclusive_group(required=True)
    subject.add_argument("--pipeline", help="folder of an export or of any other diffusers pipeline")
    subject.add_argument("--teacher", help="a teacher's folder or hub id, 'embedded' or 'faces'; sampled by --solver")
    subject.add_argument("--images", help="images made elsewhere: a folder, or an .npz")
    command.add_argument(
        "--protocol", default="embedded", help="%(default)s (default), faces, cifar50k, imagenet50k, coco30k, or a file"
    )
    command.add_argument("--solver", help="DDIM (default), UniPC, Euler, Heun, 'DPM-Solver++ 2M', ...")
    flags_of_trust(command)
    command.add_argument("--batch_size", type=COUNT, help="changes only the speed; default: 100")
    flag_of_compile(command)
    command.add_argument("--write_reference", type=Path, help="also write the statistics of the reference (.npz)")
    command.add_argument(
        "--output", type=Path, default=Path("evaluation.json"),
        help="result file (.json), with all numbers and what they depend on; default: %(default)s",
    )  # fmt: skip
    command.add_argument("--report", help="also write a page (.html) of the result")
    fields = command.add_argument_group("override values of the protocol; the result records which")
    for name, kind, text in PROTOCOL_FLAGS:
        fields.add_argument(f"--{name}", type=kind, nargs="+" if name == "metrics" else None, help=text)


def flags_of_export(command: argparse.ArgumentParser) -> None:
    """Add the flags of ``stepdistill export``."""
    command.add_argument("--config", required=True, help="config.yaml in the run's folder")
    command.add_argument("--output", required=True, help="folder to write")
    flags_of_hub(command, required=False)
    command.add_argument("overrides", nargs="*", metavar="section.key=value")


def flags_of_table(command: argparse.ArgumentParser, config: str) -> None:
    """Add the flags of commands that make a table from a configuration."""
    command.add_argument("--config", default=f"configs/{config}.yaml", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.add_argument("--report", help="also write a page (.html) of the result")


def add(commands: argparse._SubParsersAction, name: str, function: object, text: str) -> argparse.ArgumentParser:
    """Add a sub-command that runs ``function``."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=function, parser=command)
    return command


def train(args: argparse.Namespace) -> None:
    """Run ``stepdistill train``."""
    from stepdistill.config import read_config
    from stepdistill.export.contract import read_contract
    from stepdistill.files.writing import check_writable
    from stepdistill.networks.sharding import is_main
    from stepdistill.training.config import resolve
    from stepdistill.training.cost import TrainingCost
    from stepdistill.training.run import Run

    config = resolve(read_config(args.config, args.overrides))
    if not args.dry_run:
        check_writable(Path(config.train.output_dir))
    run = Run(config)
    if args.dry_run:
        print(run.plan())
        return
    folder = run.train()
    if not is_main():
        return
    cost = TrainingCost(**read_contract(folder).origin.training)
    print(f"student: {visible(str(folder))}, after {cost}")


def generate(args: argparse.Namespace) -> None:
    """Run ``stepdistill generate``."""
    from stepdistill.inference.generate import (
        Request,
        collect_prompts,
        decode_flag,
        generate_images,
        open_pipeline,
        open_teacher,
    )
    from stepdistill.inference.processes import open_state
    from stepdistill.inference.rows import network_of
    from stepdistill.inference.saving import check_outputs, check_places, save_images, side_by_side
    from stepdistill.networks.compilation import compile_blocks

    check_flags_of_generate(args)
    check_places(args.output)
    about = {"pipeline": args.pipeline}
    if args.negative_prompt is not None:
        about["negative_prompt"] = decode_flag(args.negative_prompt, "--negative_prompt")
    call = {}
    for name in ("num_inference_steps", "guidance_scale"):
        if getattr(args, name) is not None:
            call[name] = getattr(args, name)
    request = Request(
        prompts=collect_prompts(args.prompt, args.prompt_file), labels=args.class_labels, num_images=args.num_images,
        seed=args.seed, batch_size=args.batch_size, negative_prompt=about.get("negative_prompt"), call=call,
    )  # fmt: skip
    pipeline = open_pipeline(args.pipeline, request, trust_of(args))
    check_outputs(pipeline, args.output)
    beside = None
    if args.compare is not None:
        beside = open_teacher(
            args.pipeline, args.compare, request, args.compare_steps or 50, args.compare_guidance_scale, trust_of(args)
        )
    if args.compile:
        compile_blocks(network_of(pipeline), "--compile")
    images = generate_images(pipeline, request)
    cost = f"{len(images)} images, {images.seconds:.3g} s per image, network calls per image: {images.calls:g}"
    if beside is not None:
        images = side_by_side(images, generate_images(*beside))
    if not open_state().is_main_process:
        return
    for output in args.output:
        save_images(images, output, seed=args.seed, about=about)
    print(f"{cost}: {', '.join(visible(str(output)) for output in args.output)}")


def evaluate(args: argparse.Namespace) -> None:
    """Run ``stepdistill evaluate``."""
    from accelerate import PartialState

    from stepdistill.evaluation.evaluate import run_protocol
    from stepdistill.evaluation.protocol import read_protocol
    from stepdistill.evaluation.reference import check_reference_place
    from stepdistill.evaluation.results import check_result_place
    from stepdistill.evaluation.sources import check_guidance
    from stepdistill.evaluation.summary import summary
    from stepdistill.export.pipeline import load_pipeline
    from stepdistill.families.config import TeacherConfig
    from stepdistill.files.schema import build
    from stepdistill.inference.rows import network_of
    from stepdistill.inference.solvers import called_teacher, check_steps
    from stepdistill.networks.compilation import compile_blocks

    check_flags_of_evaluate(args)
    check_result_place(args.output)
    check_reference_place(args.write_reference)
    check_new_file(args.report, ".html")
    flags = {name: getattr(args, name) for name, _, _ in PROTOCOL_FLAGS}
    protocol, about = read_protocol(args.protocol, flags, of_files=args.images is not None)
    pipeline, call = None, protocol.call()
    if args.pipeline is not None:
        pipeline = load_pipeline(args.pipeline, **trust_of(args))
        check_guidance(pipeline, call)
    elif args.teacher is not None:
        teacher = build(TeacherConfig, {"path": args.teacher, **trust_of(args)}, "--teacher")
        pipeline, call = called_teacher(teacher, args.solver or "DDIM", call)
        check_steps(pipeline.scheduler.config, protocol.num_inference_steps or 1, "num_inference_steps", args.teacher)
    if args.compile and pipeline is not None:
        compile_blocks(network_of(pipeline), "--compile")
    result = run_protocol(
        protocol, about, output=args.output, pipeline=pipeline, call=call, images=args.images,
        batch_size=args.batch_size or 100, name=args.pipeline or args.teacher or args.images,
        write_reference=args.write_reference,
    )  # fmt: skip
    if not PartialState().is_main_process:
        return
    print(f"{summary(result)}\n\nresult: {visible(str(args.output))}")
    for key, (preset, given) in about["overridden"].items():
        print(f"{key}: {shown(given)} overrides {shown(preset)} of protocol {about['name']!r}", file=sys.stderr)
    write_page(args.report, args.output)


def compare(args: argparse.Namespace) -> None:
    """Run ``stepdistill compare``."""
    from stepdistill.evaluation.compare import compare, read_results

    print(compare(read_results(args.results)))


def export(args: argparse.Namespace) -> None:
    """Run ``stepdistill export``."""
    from stepdistill.config import read_config
    from stepdistill.files.writing import check_writable
    from stepdistill.training.config import resolve
    from stepdistill.training.run import Run, check_output

    config = resolve(read_config(args.config, args.overrides))
    check_writable(Path(args.output))
    check_output(Path(args.output), config)  # before the models are opened
    check_flags_of_hub(args, config.export)
    print(visible(str(Run(config).export_checkpoint(Path(args.output)))))
    push_if_asked(args, Path(args.output))


def benchmark(args: argparse.Namespace) -> None:
    """Run ``stepdistill benchmark``."""
    from stepdistill.benchmark.config import BenchmarkConfig
    from stepdistill.benchmark.publish import benchmark
    from stepdistill.config import read_config
    from stepdistill.files.schema import build

    check_new_file(args.report, ".html")
    path = benchmark(build(BenchmarkConfig, read_config(args.config, args.overrides)), time=args.time)
    print(path.read_text(encoding="utf-8"))
    write_page(args.report, path.with_suffix(".json"))


def report(args: argparse.Namespace) -> None:
    """Run ``stepdistill report``."""
    from stepdistill.benchmark.report import write_report

    print(visible(str(write_report([Path(path) for path in args.results], Path(args.output)))))


def write_page(output: str | None, result: Path) -> None:
    """Write the page of ``--report``, if it is given."""
    if output is not None:
        from stepdistill.benchmark.report import write_report

        print(visible(str(write_report([result], Path(output)))))


def demo(args: argparse.Namespace) -> None:
    """Run ``stepdistill demo``."""
    from stepdistill.benchmark.demo import demo, demo_of
    from stepdistill.config import read_config

    check_new_file(args.report, ".html")
    demo(args.config, args.overrides)
    write_page(args.report, Path(demo_of(read_config(args.config, args.overrides)).measured.output))


if __name__ == "__main__":
    main()
