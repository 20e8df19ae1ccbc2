"""The `outpace` command.

Nothing heavy is imported at the top: `outpace --help` answers at once, and each subcommand imports what it
needs when it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from outpace import __version__, settings
from outpace.config import EngineConfig, ServerConfig, flag
from outpace.errors import ConfigError, InvalidRequestError, OutpaceError

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

# SamplingParams' fields that make sense in a terminal: name, type, help.
_SAMPLING: tuple[tuple[str, type, str], ...] = (
    ("max_tokens", int, "Length limit of the answer; the default is what the context allows"),
    ("temperature", float, "0 always takes the most probable token (default: 1)"),
    ("top_p", float, "Keep the most probable tokens that together reach this probability"),
    ("top_k", int, "Keep this many most probable tokens"),
    ("min_p", float, "Drop tokens less probable than this times the most probable one"),
    ("presence_penalty", float, "Discourage tokens that were used, in [-2, 2]"),
    ("frequency_penalty", float, "Discourage tokens for each time they were used, in [-2, 2]"),
    ("repetition_penalty", float, "Divide the logits of tokens that were used"),
    ("stop", str, "String that ends the answer; may be given several times"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Without the program's name; None takes the process's.

    Returns:
        The exit code: 2 if a setting or an argument is at fault, 130 after Ctrl-C.
    """
    args = _parser().parse_args(arguments)
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except OutpaceError as error:
        print(f"outpace {args.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigError | InvalidRequestError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left. Python flushes stdout once more at exit, and must not fail there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        print(f"outpace {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="outpace", description="Serves language models; speculates only when it pays.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_serve(commands)
    _add_generate(commands)
    _add_chat(commands)
    _add_convert(commands)
    _add_bench(commands)
    _add_profile(commands)
    _add_simulate(commands)
    _add_training(commands)
    return parser


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> _Parser:
    epilog = (
        "Every setting is also read from the environment (OUTPACE_MAX_NUM_SEQS for --max-num-seqs) and from "
        "the YAML file of --config. A flag counts more than the environment, that more than the file. "
        "OUTPACE_CACHE moves the directory of downloads and built kernels."
    )
    parser: _Parser = commands.add_parser(
        name, help=help, description=help + ".", epilog=epilog, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


# --- serve ----------------------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    parser = _add(commands, "serve", _serve, "serve a model over the OpenAI API")
    settings.add_flags(parser, [EngineConfig, ServerConfig])


def _serve(args: argparse.Namespace) -> int:
    engine_config = settings.load(EngineConfig, vars(args), os.environ)
    server_config = settings.load(ServerConfig, vars(args), os.environ)
    from outpace.server.run import serve

    return serve(engine_config, server_config)


# --- generate -------------------------------------------------------------------------------------------


def _add_generate(commands: Any) -> None:
    parser = _add(commands, "generate", _generate, "continue a prompt and print the text")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text; default: --file or stdin")
    parser.add_argument("--file", type=Path, metavar="FILE", help="read the prompt from a file")
    parser.add_argument("--json", action="store_true", help="print everything that is known of the result")
    _add_sampling_flags(parser)
    parser.add_argument("--n", metavar="N", default=argparse.SUPPRESS, help="Number of answers (default: 1)")
    parser.add_argument(
        "--logprobs",
        metavar="N",
        default=argparse.SUPPRESS,
        help="With --json: the N best of each token",
    )
    settings.add_flags(parser, [EngineConfig], model_positional=False)


def _generate(args: argparse.Namespace) -> int:
    config = settings.load(EngineConfig, vars(args), os.environ)
    options = _sampling_options(args)
    for name in ("n", "logprobs"):
        if name in args:
            options[name] = settings.parse_value(int, getattr(args, name), flag(name))
    prompt = _read_prompt(args)
    from outpace.llm import LLM
    from outpace.sampling import SamplingParams

    sampling = SamplingParams(**options)
    (result,) = LLM(**dataclasses.asdict(config)).generate(prompt, sampling)
    if args.json:
        print(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
    else:
        print(*(answer.text for answer in result.outputs), sep="\n")
    return 0


def _read_prompt(args: argparse.Namespace) -> str:
    """The prompt, less the newline that ends a file or a pipe.

    Raises:
        ConfigError: There is none, there are two, or it is not UTF-8.
    """
    if args.prompt is not None and args.file is not None:
        raise ConfigError("give the prompt as an argument or in --file, not both")
    if args.prompt is None and args.file is None and sys.stdin.isatty():
        raise ConfigError("no prompt: give it as an argument, in --file or on stdin")
    try:
        if args.file is not None:
            prompt = args.file.read_text(encoding="utf-8").removesuffix("\n")
        else:
            prompt = sys.stdin.read().removesuffix("\n") if args.prompt is None else args.prompt
        prompt.encode()  # arguments that are not UTF-8 come with lone surrogates
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read the prompt: {error}") from None
    return str(prompt)


# --- chat -----------------------------------------------------------------------------------------------


def _add_chat(commands: Any) -> None:
    parser = _add(commands, "chat", _chat, "talk to a model in the terminal")
    parser.add_argument("--url", metavar="URL", help="load no model, talk to this OpenAI-compatible server")
    parser.add_argument("--api-key", metavar="KEY", help="for --url; the default is $OPENAI_API_KEY")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling_flags(parser)
    settings.add_flags(parser, [EngineConfig])


def _chat(args: argparse.Namespace) -> int:
    config = settings.load(EngineConfig, vars(args), os.environ)
    options = _sampling_options(args)
    from outpace import terminal

    if args.url is None:
        return terminal.talk(terminal.LocalModel(config, options), args.system)
    for field in dataclasses.fields(EngineConfig):
        if field.name in args and field.name not in ("model", "seed"):
            raise ConfigError(f"{flag(field.name)} is about a model in this process; --url excludes it")
    if "seed" in args:
        options["seed"] = config.seed
    api_key = args.api_key or os.environ.get("OPENAI_API_KEY")
    return terminal.talk(terminal.RemoteModel(args.url, api_key, config.model, options), args.system)


# --- convert --------------------------------------------------------------------------------------------


def _add_convert(commands: Any) -> None:
    help = "write a model, such as a GGUF file, as a Hugging Face directory"
    parser: _Parser = commands.add_parser("convert", help=help, description=help + ".", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="GGUF file, directory or hub id")
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to write; new or empty")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from outpace.models.convert import convert

    convert(args.model, args.directory)
    return 0


# --- bench ----------------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    from outpace.bench.commands import add_flags

    help = "measure servers: one, or configurations against each other"
    add_flags(commands.add_parser("bench", help=help, description=help + ".", allow_abbrev=False))


# --- profile and simulate -------------------------------------------------------------------------------


def _add_profile(commands: Any) -> None:
    parser = _add(commands, "profile", _profile, "measure what steps cost, print and plot it")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="also write the profile to this JSON file"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it as PNG (needs matplotlib)")
    parser.add_argument("--show", type=Path, metavar="FILE", help="measure nothing, show this profile")
    parser.add_argument(
        "--roofline",
        metavar="JSON",
        help="measure nothing, derive it from data sheets: params, bandwidth, flops, and perhaps "
        "weight_bytes, kv_bytes, pair_flops, fixed_s, efficiency, max_rows",
    )
    settings.add_flags(parser, [EngineConfig])


def _profile(args: argparse.Namespace) -> int:
    config = settings.load(EngineConfig, vars(args), os.environ)
    from outpace import planning

    return planning.profile(config, args.show, args.roofline, args.output, args.plot)


def _add_simulate(commands: Any) -> None:
    help = "replay a workload against a profile under several policies"
    parser: _Parser = commands.add_parser("simulate", help=help, description=help + ".", allow_abbrev=False)
    add = parser.add_argument
    add("profile", metavar="PROFILE", type=Path, help="JSON file of outpace profile")
    add("--policy", action="append", metavar="NAME[:K]", help="may be given several times; K draft tokens")
    add("--spec-tokens", default="5", metavar="N", help="most draft tokens where K is not given (default: 5)")
    add("--spec-method", default="prompt_lookup", metavar="NAME", help="what smartspec takes it for")
    add("--concurrency", metavar="N", help="closed loop: so many requests at a time (default: 8)")
    add("--request-rate", metavar="X", help="open loop: Poisson arrivals per second")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="open loop: CSV with timestamp_s, prompt_tokens, output_tokens",
    )
    add("--speed", default="1", metavar="X", help="factor on the trace's rate of arrival (default: 1)")
    add("--num-requests", default="64", metavar="N", help="how many (default: 64)")
    add("--prompt-len", default="256", metavar="N", help="tokens (default: 256)")
    add("--output-len", default="128", metavar="N", help="tokens (default: 128)")
    add(
        "--acceptance",
        default="0.7",
        metavar="X[,X…]|JSON",
        help="chance of a draft token by depth, or a list of objects with rates, coverage, spread, since_s",
    )
    add("--coverage", default="1", metavar="X", help="chance that there is a draft (default: 1)")
    add("--spread", default="0", metavar="X", help="by how much requests differ in acceptance (default: 0)")
    add("--noise", default="0.05", metavar="X", help="standard deviation of log step times (default: 0.05)")
    add("--max-num-seqs", default="64", metavar="N", help="most sequences at once (default: 64)")
    add("--max-num-batched-tokens", default="512", metavar="N", help="most rows of a step (default: 512)")
    add("--slo-ttft-ms", metavar="X", help="policy slo: target for the first token")
    add("--slo-tpot-ms", metavar="X", help="policy slo: target per later token")
    add("--seed", default="0", metavar="N", help="of all luck (default: 0)")
    parser.set_defaults(run=_simulate)


def _simulate(args: argparse.Namespace) -> int:
    from outpace import planning

    return planning.simulate(args)


# --- train, distill and evaluate ------------------------------------------------------------------------


def _add_training(commands: Any) -> None:
    from outpace.training.commands import add_distill_flags, add_evaluate_flags, add_train_flags

    for name, add_flags, help in (
        ("train", add_train_flags, "train a draft for a model"),
        ("distill", add_distill_flags, "answer a dataset's prompts with a model, to train drafts on"),
        ("evaluate", add_evaluate_flags, "measure what a trained draft gives when it is served"),
    ):
        add_flags(commands.add_parser(name, help=help, description=help + ".", allow_abbrev=False))


def _add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Sampling")
    for name, kind, help in _SAMPLING:
        action = "append" if name == "stop" else "store"
        metavar = {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(flag(name), action=action, metavar=metavar, default=argparse.SUPPRESS, help=help)


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling flags that were given.

    Raises:
        ConfigError: One is not of its type.
    """
    given = [(name, kind) for name, kind, _ in _SAMPLING if name in args and name != "stop"]
    options = {name: settings.parse_value(kind, getattr(args, name), flag(name)) for name, kind in given}
    return options | ({"stop": tuple(args.stop)} if "stop" in args else {})


if __name__ == "__main__":
    sys.exit(main())
