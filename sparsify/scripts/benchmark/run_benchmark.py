"""Time training steps against a plain reference step and against the arithmetic they need.

    python sparsify/scripts/benchmark/run_benchmark.py [--shape tiny] [--mode e2e] [--json FILE]

Each row is measured in a process of its own, our steps and the reference's in turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsify.scripts.benchmark.shapes import MODES, SHAPES, TECHNIQUES
from sparsify.scripts.cli import exit_code_of
from sparsify.settings.command_line import Parser
from sparsify.settings.paths import user_path
from sparsify.settings.terminal import tell

Row = dict[str, Any]
"""Strings and numbers by name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script with `argv`, None for the process's arguments; returns the exit code."""
    return exit_code_of(lambda: benchmark(parse(argv)))


def benchmark(options: argparse.Namespace) -> int:
    """Measure what is asked for, write and print it; returns the exit code."""
    if options.shape and options.mode:
        rows = [measure_here(options)]
    else:
        has_gpu = options.device == "cuda"
        possible = [name for name, shape in SHAPES.items() if has_gpu or not shape.needs_gpu]
        shapes = [options.shape] if options.shape else possible
        modes = [options.mode] if options.mode else MODES
        rows = [measure_apart(shape, mode, options) for shape in shapes for mode in modes]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print_report(rows)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = Parser(description="Time training steps.")
    parser.add_argument("--shape", choices=SHAPES, help="sizes of the step; all if not given")
    parser.add_argument("--mode", choices=MODES, help="mix of loss terms; all if not given")
    parser.add_argument("--n-steps", type=int, default=9, help="timed steps of either kind (9)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the rows here too")
    parser.add_argument(
        "--without",
        action="append",
        choices=TECHNIQUES,
        default=[],
        help="take our step the plain way here; can be given several times",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile our step's KL, as `compile: true` does"
    )
    options = parser.parse_args(argv)
    if options.n_steps < 1:
        parser.error(f"--n-steps: {options.n_steps} gives no median; set it to 1 or more")
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder '{options.json.parent}'; make it first")
    if options.shape and SHAPES[options.shape].needs_gpu and options.device != "cuda":
        parser.error(f"--shape: {options.shape} needs a GPU; add --device cuda")
    return options


def measure_here(options: argparse.Namespace) -> Row:
    """One row, measured in this process."""
    import torch

    from sparsify.scripts.benchmark.measure import measure
    from sparsify.scripts.benchmark.techniques import switched_off

    with switched_off(options.without):
        device = torch.device(options.device)
        row = measure(options.shape, options.mode, options.n_steps, device, options.compile)
    return row | {"without": options.without, "is_compiled": options.compile}


def measure_apart(shape: str, mode: str, options: argparse.Namespace) -> Row:
    """One row, measured in a process of its own."""
    tell(f"measuring {shape}, {mode} ...")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--shape", shape, "--mode", mode, "--json", str(path)]
        command += ["--n-steps", str(options.n_steps), "--device", options.device]
        command += [f"--without={name}" for name in options.without]
        command += ["--compile"] if options.compile else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (row,) = json.loads(path.read_text(encoding="utf-8"))
    return row


def print_report(rows: list[Row]) -> None:
    """The rows as a table, and how to read it."""
    from sparsify.scripts.benchmark.floor import FORMULA

    header = ("tokens/s", "reference", "speedup", "extra MB", "reference", "x floor")
    print(f"{'shape':10} {'mode':11}" + "".join(f"{name:>11}" for name in header) + "     L0")
    for row in rows:
        print(
            f"{row['shape']:10} {row['mode']:11}{row['tokens_per_s']:11,.0f}"
            f"{row['reference_tokens_per_s']:11,.0f}{row['speedup']:11.2f}{row['extra_mb']:11,.0f}"
            f"{row['reference_extra_mb']:11,.0f}{row['floor_ratio']:11.2f}{row['l0']:7.1f}"
        )
    first = rows[0]
    if first["without"]:
        print(f"\nwithout {', '.join(first['without'])}")
    if first["is_compiled"]:
        print("\nwith a compiled KL")
    print(
        "\nextra MB   peak beyond the weights, with gradients and optimizer state"
        "\nx floor    step's time / time of the arithmetic that it cannot avoid\n\n"
        f"{FORMULA}\n{first['device']}, {first['n_threads']} threads, "
        f"{first['matmul_gflops']:.0f} GFLOP/s in products, "
        f"Python {first['python']}, torch {first['torch']}, "
        f"TransformerLens {first['transformer_lens']}"
    )


if __name__ == "__main__":
    sys.exit(main())
