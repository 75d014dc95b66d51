"""The flags that scripts share: `add_*_flag` adds one to a parser; their types, and what their values ask for."""

import argparse
import math
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from configs import schema
from configs.errors import UserError, did_you_mean
from flow.runtime import cli, commands, files, messages
from flow.solvers import ADAPTIVE, SOLVERS, max_steps_for_nfe, sde, time_grids, validate_options

MOST = 2**31 - 1  # default upper limit of a whole number on the command line
MOST_SEED = schema.INT64_LIMIT - 1
WEIGHTS = "run folder, checkpoint folder, .safetensors file or hf:owner/name[@revision]"  # what --weights takes


def parse_training(parser: cli.Parser) -> argparse.Namespace:
    """The command line of a trainer: -c, -e, -mp, which becomes an override, and configuration keys."""
    add_config_flag(parser, "configuration; a resumed run defaults to its own")
    parser.add_argument("-e", "--exp_dir", metavar="DIR", type=Path, help="run folder (default: runs/<name of the YAML>)")
    parser.add_argument("-mp", "--mixed_precision", choices=schema.PRECISION_CHOICES, help="sets train.mixed_precision")
    args = parser.parse()
    if args.mixed_precision:
        args.overrides.append(f"train.mixed_precision={args.mixed_precision}")
    return args


def add_resume_flag(parser: cli.Parser) -> cli.Parser:
    """-r, of the trainers that can resume."""
    parser.add_argument("-r", "--resume", metavar="latest|PATH", help="resume from the latest checkpoint, or from this one")
    return parser


def add_weights_flag(parser: cli.Parser, required: bool = True, several: bool = False) -> None:
    """--weights. Keys of trainings have no effect then, see `snapshot.load`."""
    parser.sections = schema.OF_WEIGHTS
    parser.add_argument("--weights", nargs="+" if several else None, required=required, metavar="PATH", help=WEIGHTS)


def add_config_flag(
    parser: argparse.ArgumentParser, use: str = "configuration; default: the one inside the weights", required: bool = False
) -> None:
    """-c."""
    parser.add_argument("-c", "--config", metavar="YAML", required=required, help=use)


def add_count_flag(
    parser: argparse.ArgumentParser, flag: str, use: str, default: int | None = None, least: int = 1, required: bool = False,
    most: int = MOST,
) -> None:  # fmt: skip
    """A whole number of at least `least` and at most `most`."""
    shown = f" (default: {default})" if default is not None else ""
    parser.add_argument(flag, type=at_least(least, most), default=default, required=required, metavar="N", help=use + shown)


def add_batch_size_flag(parser: argparse.ArgumentParser, default: int = 100) -> None:
    """--bspp, the batch size per process."""
    add_count_flag(parser, "--bspp", "batch size per process", default)


def add_seed_flag(parser: argparse.ArgumentParser, default: int = 8888, use: str = "noise") -> None:
    """--seed, and what it is the seed of."""
    add_count_flag(parser, "--seed", f"seed of the {use}", default, least=0, most=MOST_SEED)


def add_launcher_flag(parser: argparse.ArgumentParser, what: str) -> None:
    """--launcher, of scripts that run `what`."""
    parser.add_argument("--launcher", type=launcher, metavar="COMMAND", help=f"what starts {what} (default: this Python)")


def add_method_flag(parser: argparse.ArgumentParser, choices: Iterable[str], default: str) -> None:
    """--sampling_method, one solver."""
    parser.add_argument("--sampling_method", choices=choices, default=default, help=f"solver (default: {default})")


def add_methods_flag(parser: argparse.ArgumentParser, choices: Iterable[str], default: list[str]) -> None:
    """--methods, several solvers."""
    shown = " ".join(default)
    parser.add_argument("--methods", nargs="+", choices=choices, default=default, help=f"solvers (default: {shown})")


def add_extractor_flag(parser: argparse.ArgumentParser, default: str = "mnist") -> None:
    """--feature_extractor, by name."""
    use = f"network of the Frechet distance (default: {default})"
    parser.add_argument("--feature_extractor", default=default, metavar="NAME", help=use)


def add_feature_flags(parser: argparse.ArgumentParser) -> None:
    """--feature_extractor, --feature_layer, --feature_weights and --allow_remote_code."""
    add_extractor_flag(parser, schema.EvaluateConfig.feature_extractor)
    parser.add_argument("--feature_layer", metavar="LAYER", help="(default: that of the Frechet distance)")
    parser.add_argument("--feature_weights", type=Path, metavar="PATH", help="local file, for machines without network")
    parser.add_argument("--allow_remote_code", action="store_true", help="run code from GitHub: the dinov2 extractors need it")


def add_compile_flag(parser: argparse.ArgumentParser) -> None:
    """--compile."""
    parser.add_argument("--compile", action="store_true", help="torch.compile the network, which pays on GPUs")


def add_precision_flag(parser: argparse.ArgumentParser, use: str = "the network") -> None:
    """-mp, of scripts that do not train."""
    choices = schema.PRECISION_CHOICES
    parser.add_argument("-mp", "--mixed_precision", choices=choices, default="no", help=f"of {use} (default: no)")


def add_guidance_flag(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """--guidance_scale, one number or `several`."""
    nargs, default = ("+", [1.0]) if several else (None, 1.0)
    shown = "v_u + w (v_c - v_u) (default: 1, off)"
    parser.add_argument("--guidance_scale", nargs=nargs, type=nonnegative, default=default, metavar="W", help=shown)


def add_guidance_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """--guidance_scale, one number or `several`, with --guidance_interval and --guide_weights."""
    add_guidance_flag(parser, several)
    parser.add_argument(
        "--guidance_interval", nargs=2, type=fraction, default=[0.0, 1.0], metavar=("LO", "HI"),
        help="times t of the guidance, outside of which the network is called once (default: 0 1)",
    )  # fmt: skip
    use = "autoguidance: v_g + w (v_c - v_g), where v_g is of this weaker model"
    parser.add_argument("--guide_weights", metavar="PATH", help=use)


def add_source_flag(parser: argparse.ArgumentParser) -> None:
    """--source, of flows between two data sets."""
    use = "start from these samples in their order: a folder of images, or a data set: NAME, NAME:train, NAME:test, toys:SHAPE"
    parser.add_argument("--source", metavar="DIR|NAME", help=f"{use} (default: held-out samples of flow.source, or noise)")


def add_labels_flag(parser: argparse.ArgumentParser, default: str = "all") -> None:
    """--labels, taken in turn; `default` describes those without the flag."""
    use = f"classes by name or number, in turn (default: {default})"
    parser.add_argument("--labels", nargs="+", metavar="CLASS", help=use)


def add_prompts_flag(parser: argparse.ArgumentParser) -> None:
    """--prompts, taken in turn."""
    parser.add_argument("--prompts", nargs="+", metavar="TEXT", help="for networks with text, one image after the other")


def add_output_flag(
    parser: argparse.ArgumentParser,
    flag: str = "--out",
    use: str = "output folder",
    metavar: str = "DIR",
    required: bool = True,
) -> None:
    """The output folder or file."""
    parser.add_argument(flag, type=lambda word: files.resolve_unnamed(Path(word)), required=required, metavar=metavar, help=use)


def add_widths_flag(parser: argparse.ArgumentParser, flag: str, use: str, required: bool = False) -> None:
    """Widths (sigma_rel) of averages of the weights."""
    parser.add_argument(flag, nargs="+", type=ema_width, required=required, metavar="SIGMA_REL", help=use)


def add_step_flags(parser: argparse.ArgumentParser, default: list[int], several: bool) -> None:
    """How long a solver may work: --sampling_steps or --nfe, one number or `several`."""
    group = parser.add_mutually_exclusive_group()
    shown = " ".join(map(str, default))
    count = "+" if several else 1
    group.add_argument("--sampling_steps", nargs=count, type=at_least(1), default=default, help=f"(default: {shown})")
    group.add_argument(
        "--nfe", nargs=count, type=at_least(1), metavar="N", help="instead: as many steps as N evaluations allow"
    )


def num_steps(args: argparse.Namespace, method: str, end: float = 1.0) -> list[int]:
    """The numbers of steps to `end` that --sampling_steps or --nfe ask of a method: one for adaptive methods, which choose
    their own. Raises UserError for too small an NFE."""
    if not args.nfe:
        return args.sampling_steps[:1] if method in ADAPTIVE else args.sampling_steps
    try:
        return [max_steps_for_nfe(method, nfe, end) for nfe in args.nfe]
    except ValueError as error:
        raise UserError(f"--nfe: {error}") from None


def add_solver_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the solvers that the sampling scripts share."""
    parser.add_argument(
        "--time_grid", choices=[*time_grids.GRIDS, "optimized"], default="uniform", help="times (default: uniform)"
    )
    parser.add_argument("--rtol", type=float, metavar="X", help="of methods with tolerances (default: 1e-5)")
    parser.add_argument("--atol", type=float, metavar="X", help="of methods with tolerances (default: 1e-5)")
    parser.add_argument("--sde_noise_scale", type=float, metavar="X", help="of stochastic methods (default: 1; 0 is the ODE)")
    parser.add_argument("--eta", type=float, metavar="X", help="of ancestral, its noise (default: 1; 0 is ddim)")
    parser.add_argument(
        "--diffusion", choices=sde.DIFFUSION_COEFFICIENTS, help="coefficient of stochastic methods (default: sigma)"
    )
    for name in further_options():
        use = f"of {', '.join(method for method, solver in SOLVERS.items() if name in solver.options)}"
        parser.add_argument(commands.option_flag(name), type=number_or_word, metavar="X", help=use)


def further_options() -> list[str]:
    """Options of solvers that `add_solver_flags` does not know by name: a solver of one's own gets a flag for each."""
    by_name = {"noise", "rtol", "atol", "noise_scale", "eta", "diffusion"}
    return sorted({name for solver in SOLVERS.values() for name in solver.options} - by_name)


def solver_options(args: argparse.Namespace, method: str, methods: Sequence[str]) -> tuple[tuple[str, float | str], ...]:
    """The options of the command line that `method` takes. Raises UserError for one that none of the `methods` takes."""
    options = {
        "rtol": args.rtol, "atol": args.atol, "noise_scale": args.sde_noise_scale, "diffusion": args.diffusion,
        "eta": args.eta, **{name: getattr(args, name) for name in further_options()},
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if not any(name in SOLVERS[m].options for m in methods):
            flag = commands.option_flag(name)
            able = ", ".join(m for m, solver in SOLVERS.items() if name in solver.options)
            raise UserError(f"{flag}: {', '.join(methods)} has no such option; it is for {able}")
    selected = {name: value for name, value in options.items() if name in SOLVERS[method].options}
    try:
        validate_options(method, **selected)
    except ValueError as error:  # starts with the name of the option
        name = re.split(r"\W", str(error), maxsplit=1)[0]
        raise UserError(commands.option_flag(name) + str(error).removeprefix(name)) from None
    return tuple(selected.items())


def labels_of(words: Sequence[str] | None, class_names: Sequence[str]) -> tuple[int, ...] | None:
    """The labels that --labels names: a class by its name, which wins, or by its number. Raises UserError for another word."""
    if not words:
        return None
    labels = []
    for word in words:
        if word in class_names:
            labels.append(class_names.index(word))
        elif re.fullmatch(r"-?[0-9]{1,18}", word):
            labels.append(int(word))
        elif class_names:
            shown = messages.first_names(class_names)
            raise UserError(f"--labels {word}: unknown class; the classes are {shown}.{did_you_mean(word, class_names)}")
        else:
            raise UserError(f"--labels {word}: the weights carry no names of classes; give numbers")
    return tuple(labels)


def label_words(labels: Sequence[int], class_names: Sequence[str]) -> list[str]:
    """What names these labels for `labels_of`: their numbers, or their names where a number is the name of another class."""
    words = map(str, labels)
    return [class_names[k] if word in class_names else word for k, word in zip(labels, words, strict=True)]


def at_least(low: int, most: int = MOST):
    """An argparse type: a whole number of at least `low` and at most `most`."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least {low}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r}: must be at most {most}")
        return value

    return whole_number


def launcher(text: str) -> str:
    """An argparse type: a command that starts scripts, as a shell reads it."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: not a valid shell command ({error})") from None
    if not words:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a command, such as torchrun --nproc_per_node 2")
    return text


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    return _number(text, sys.float_info.max, "a finite number above 0", low=sys.float_info.min)


def nonnegative(text: str) -> float:
    """An argparse type: a finite number of 0 or more."""
    return _number(text, sys.float_info.max, "a finite number of 0 or more")


def ema_width(text: str) -> float:
    """An argparse type: a number above 0 and below 12^-0.5."""
    low, high = sys.float_info.min, math.nextafter(schema.MAX_EMA_WIDTH, 0)
    return _number(text, high, f"a number above 0 and below {schema.MAX_EMA_WIDTH:.4f}", low)


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    return _number(text, 1.0, "a number from 0 to 1")


def number_or_word(text: str) -> float | str:
    """An argparse type: a number where the text is one, else the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(text: str, high: float, rule: str, low: float = 0.0) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {rule}")
    return value
