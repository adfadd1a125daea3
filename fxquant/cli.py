"""The command line: fxquant ls | show | validate | run | analyze | lower | coverage | bench | report | compare."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import fx
from typer.core import TyperGroup

from . import checkpoint, report
from .errors import DataWorkerError, DivergenceError, FxQuantError, ParityError, WriteError
from .files import write_json, write_text
from .interruption import STATUS, how_to_go_on, terminable, what_is_left
from .lower import operators
from .lower.onnx import TWO_BIT_FORMS
from .recipe import Recipe, RecipeError, load_recipe
from .spec import BACKENDS, get_backend
from .verify import VerifyReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a vision model at 1 to 8 bits and ship the same integers.",
)


class _Bench(TyperGroup):
    """``fxquant bench ...`` without the name of a measurement is ``fxquant bench latency ...``."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(ctx, args if named else ["latency", *args])


bench_app = typer.Typer(
    cls=_Bench, help="Measure: latency and size (when nothing else is named), a training step, or accuracy."
)
app.add_typer(bench_app, name="bench")
# A file has no width that a table must be cut to; a terminal, and COLUMNS, tell theirs.
out = Console(soft_wrap=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)
err = Console(stderr=True, soft_wrap=True, highlight=False)

RecipePath = Annotated[Path, typer.Argument(help="recipe file (TOML)", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, such as train.epochs=3; repeatable")]
Seed = Annotated[int | None, typer.Option(help="replaces the recipe's seed")]


def main() -> None:
    """Entry point: the errors users can mend become one message and exit status 2, failed parity status 3, a process
    that was killed from outside status 1."""
    # torch.ao's notices of its own removal are for fxquant, not for its users.
    warnings.filterwarnings("ignore", message=r".*deprecated", module=r"torch\..*")
    warnings.showwarning = _show_warning
    try:
        app()
    except ParityError as error:
        err.print(f"[bold red]parity failed:[/] {error}", markup=True)
        sys.exit(3)
    except FxQuantError as error:
        if _speaks():
            err.print("[bold red]error:[/] ", end="")
            err.print(str(error), markup=False)
        sys.exit(1 if isinstance(error, DataWorkerError) else 2)
    except RuntimeError as error:
        from .train.processes import lost_another

        if not _speaks():
            sys.exit(2)
        if not lost_another(error):
            raise
        err.print("[bold red]error:[/] another process of this run is gone; start it again with --resume", markup=True)
        sys.exit(2)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning of fxquant's as one line for its users; another library's as Python shows it, with its place."""
    if Path(__file__).parent not in Path(filename).parents:
        err.print(warnings.formatwarning(message, category, filename, lineno, line), end="", markup=False)
    else:
        _warn_once(str(message))


@functools.cache
def _warn_once(message: str) -> None:
    """Python forgets what it has shown wherever filters change, and a run prepares its model more than once."""
    err.print("[bold yellow]warning:[/] ", end="")
    err.print(message, markup=False)


def _speaks() -> bool:
    """Whether this process is to say why the run ended: of several, the first that it ended in."""
    from .train.processes import first_to_fail

    return first_to_fail()


@app.command("ls")
def list_recipes(
    folder: Annotated[Path, typer.Argument(help="folder of recipes")] = Path("recipes"),
) -> None:
    """List the recipes of a folder."""
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not a folder; give the one that holds the recipes")
    table = Table()
    for heading in ("recipe", "model", "data", "estimator", "rules", "budget"):
        table.add_column(heading, overflow="fold")
    for path in sorted(folder.glob("*.toml")):
        recipe = load_recipe(path)
        budget = ", ".join(f"{k} {v:g}" for k, v in recipe.budget.model_dump().items() if v is not None)
        rules = ", ".join(f"{r.pattern} W{r.weight_bits}A{r.activation_bits}" for r in recipe.built_rules())
        estimator = recipe.quantization.estimator if recipe.quantizes else "float"
        table.add_row(path.name, recipe.model.name, recipe.data.name, estimator, rules, budget)
    out.print(table)


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None, seed: Seed = None) -> None:
    """Print a recipe as it resolves: extended, overridden, with every default."""
    out.print_json(load_recipe(recipe, overrides, seed).to_json())


@app.command()
def validate(
    recipes: Annotated[list[Path], typer.Argument(help="recipe files", show_default=False)],
) -> None:
    """Check recipes without running them; all problems of all of them at once."""
    problems = []
    for path in recipes:
        try:
            load_recipe(path)
            out.print(f"{path}: ok", markup=False, highlight=False)
        except RecipeError as error:
            problems.append(str(error))
    if problems:
        raise RecipeError("\n".join(problems))


@app.command()
def run(
    recipe: RecipePath,
    output: Annotated[Path | None, typer.Option(help="folder for the results [default: runs/<recipe>]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --output")] = False,
    seed: Seed = None,
    overrides: Overrides = None,
) -> None:
    """Train a recipe, convert, lower, verify, and leave model.fxq and result.json in --output."""
    resolved = load_recipe(recipe, overrides, seed)
    folder = output or Path("runs") / resolved.name
    try:
        with terminable():
            from .train import run as run_recipe
            from .train.processes import leave

            with _Bars(out) as bars:
                outcome = run_recipe(resolved, folder, resume=resume, progress=bars)
    except KeyboardInterrupt as interrupt:
        how = "interrupted" if type(interrupt) is KeyboardInterrupt else "terminated"
        if _speaks():
            err.print(f"{how}; {how_to_go_on(folder)}", markup=False)
        raise typer.Exit(STATUS[type(interrupt)]) from None
    except (WriteError, DataWorkerError):
        if _speaks():
            err.print(how_to_go_on(folder), markup=False)
        raise
    except DivergenceError:
        if _speaks():
            if resolved.divergence.action == "stop":  # the same command would diverge at the same step
                err.print(how_to_go_on(folder, "divergence.action=rollback"), markup=False)
            else:
                err.print(what_is_left(folder), markup=False)
        raise
    leave()
    if outcome is None:
        return
    if not resolved.quantizes:
        accuracy = outcome.result["float_accuracy"]
        out.print(f"{resolved.name}, seed {resolved.seed}: float, {accuracy:.2f} %; written to {folder}", markup=False)
        return
    out.print(report.layer_table(outcome.model, "Who got which bits"))
    for backend, model in outcome.lowered.items():
        if layers := operators(model):
            out.print(report.lowering_summary(layers, backend), highlight=False)
    out.print(_summary(resolved, outcome.report, outcome.result["float_accuracy"]))
    out.print(f"written to {folder}", markup=False, highlight=False)
    outcome.report.raise_on_failure()


@app.command()
def analyze(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="a recipe with float weights, or a run: its folder or checkpoint.pt"),
    ],
    overrides: Overrides = None,
    sensitivity: Annotated[
        str | None, typer.Option(help="allocate the recipe's budget by it: capacity, fisher or loss")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="plain training batches to measure on")] = 4,
    output: Annotated[Path | None, typer.Option(help="write the rules table (TOML) that a recipe can extend")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write what is printed as JSON")] = None,
    check_cut: Annotated[
        bool, typer.Option("--check-cut", help="compare a bit more in the cut with a bit more elsewhere; no training")
    ] = False,
    draws: Annotated[int, typer.Option(min=1, help="of --check-cut, sets of other layers")] = 10,
    seed: Annotated[int, typer.Option(help="of --check-cut, for the draws")] = 0,
) -> None:
    """Measure what every quantized tensor carries and where the network is narrowest; allocate bits to a budget."""
    from . import train
    from .analyze import analyze as analyse
    from .cut_check import check_cut as check

    opened = train.open_source(source, overrides)
    analysis = analyse(opened.model, max_batches=batches)
    found = {"source": str(source), "recipe": opened.recipe.name, "capacity": analysis.to_dict()}
    out.print(report.capacity_table(analysis))
    for line in report.cut_lines(analysis):
        out.print(line, markup=False, highlight=False)
    if opened.recipe.allocation is not None or sensitivity is not None:
        changed = {} if sensitivity is None else {"sensitivity": sensitivity}
        allocation = train.allocate_for(opened.recipe, opened.model, batches=batches, **changed)
        out.print(report.allocation_table(opened.model, allocation))
        found["allocation"] = {"widths": allocation.widths, "spent": allocation.spent, "seconds": allocation.seconds}
        if output is not None:
            table = allocation.to_toml(opened.recipe.quantization.estimator, opened.recipe.quantization.options)
            write_text(output, table)
            out.print(f"written to {output}", markup=False, highlight=False)
    elif output is not None:
        raise FxQuantError(
            f"--output {output} is for the rules of an allocation; add --sensitivity fisher, or leave it out"
        )
    if check_cut:
        checked = check(
            opened.float_model,
            opened.rules,
            opened.data.plain(),
            lambda model: train.accuracy_of(model, opened.data.test()),
            statistics_images=lambda: train.statistics_images(opened.recipe, opened.data),
            **opened.recipe.quantization.prepare_options,
            draws=draws,
            seed=seed,
            max_batches=batches,
            watch=lambda line: err.print(line, markup=False),
        )
        found["cut_check"] = checked.to_dict()
        for line in report.cut_check_lines(checked):
            out.print(line, markup=False, highlight=False)
    if json_file is not None:
        write_json(json_file, found)


@app.command()
def lower(
    source: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="a finished run: its folder, model.fxq or checkpoint.pt"),
    ],
    backend: Annotated[str, typer.Option(help=", ".join(BACKENDS))] = "x86",
    output: Annotated[Path | None, typer.Option(help="write the outcome as JSON to this file")] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="where the runtime's file goes [default: model.onnx in the run]")
    ] = None,
    weight_only: Annotated[
        bool, typer.Option("--weight-only", help="in the file, linear layers of up to 4 bits multiply in float")
    ] = False,
    two_bit: Annotated[
        str, typer.Option(help=f"in the file, form of 1- and 2-bit weights: {' or '.join(TWO_BIT_FORMS)} (opset 25)")
    ] = TWO_BIT_FORMS[0],
) -> None:
    """Put a finished run's integers on a backend's kernels, or in its file; verify on the held-out images."""
    from .train import load_run, lower_to
    from .verify import verify

    options = {
        f"--onnx {onnx}": onnx is not None,
        "--weight-only": weight_only,
        f"--two-bit {two_bit}": two_bit != TWO_BIT_FORMS[0],
    }
    given = " ".join(option for option, is_given in options.items() if is_given)
    spec = get_backend(backend)
    if given and not spec.reads_onnx:
        raise FxQuantError(f"{given} was given, but backend {backend!r} reads no file; leave it out")
    loaded = load_run(source)
    file = onnx or (source if source.is_dir() else source.parent) / checkpoint.ONNX_MODEL
    lowered = lower_to(loaded.reference, backend, file, weight_only_linear=weight_only, two_bit=two_bit)
    outcome = verify(None, loaded.reference, loaded.data.test(), lowered={backend: lowered})
    layers = operators(lowered)
    if layers:
        out.print(report.lowering_table(layers, backend))
    else:
        out.print(f"written to {file}, {file.stat().st_size:,} bytes", markup=False, highlight=False)
    out.print(_summary(loaded.recipe, outcome, None))
    if output is not None:
        parity = outcome.lowered[backend]
        write_json(
            output,
            {
                "recipe": loaded.recipe.name,
                "backend": backend,
                "reference_accuracy": outcome.reference_accuracy,
                "accuracy": parity.accuracy,
                "argmax_agreement": parity.argmax_agreement,
                "logits_equal": parity.logits_equal,
                "max_code_difference": parity.max_code_difference,
                "operators": [vars(layer) for layer in layers],
            },
        )
    outcome.raise_on_failure()


@app.command("coverage")
def coverage_command(
    models: Annotated[
        Path | None, typer.Option(help="file of 'model input_size' lines [default: timm's test_* models]")
    ] = None,
    output: Annotated[Path, typer.Option(help="folder for the table, coverage_w<bits>.csv")] = Path("runs/coverage"),
    bits: Annotated[int, typer.Option(help="width of all layers but the first and the last")] = 4,
    resume: Annotated[bool, typer.Option("--resume", help="keep the rows that are there")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="through torch.ao as it comes instead, to compare")] = False,
) -> None:
    """Take timm models through every stage, each in a process of its own; one CSV row a model."""
    from . import coverage, timm
    from .grid import check_bits

    check_bits(bits)
    chosen = coverage.read_models(models) if models else [(name, 160) for name in timm.list_models("test_*")]

    def watch(row: coverage.Row) -> None:
        state = "ok" if row.passed else row.failed or "gradients or bits differ"
        out.print(
            f"{row.model}: {state}; {row.layers} layers, MACs on integers {row.integer_macs:.1%}, {row.seconds:.0f} s",
            markup=False,
            highlight=False,
        )

    table = output / f"coverage_{'plain_' if plain else ''}w{bits}.csv"
    rows = coverage.cover(chosen, bits, table, resume=resume, watch=watch, way="torch.ao" if plain else "fxquant")
    out.print(coverage.summary(rows), markup=False, highlight=False)


@bench_app.command("latency")
def bench_latency(
    source: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="a finished run, in place of --model", show_default=False)
    ] = None,
    model: Annotated[str | None, typer.Option(help="a timm model, with random weights")] = None,
    image_size: Annotated[int | None, typer.Option(help="pixels a side [default: the model's own]")] = None,
    bits: Annotated[str | None, typer.Option(help="widths of all layers but the first and last [default: 8,4]")] = None,
    batch: Annotated[str, typer.Option(help="batch sizes")] = "1,16",
    backends: Annotated[str | None, typer.Option(help="names with commas [default: every backend]")] = None,
    rounds: Annotated[int, typer.Option(help="bursts of each contender at each batch size")] = 20,
    burst: Annotated[float, typer.Option(help="milliseconds a burst is to take")] = 200.0,
    wall: Annotated[bool, typer.Option("--wall", help="wall time instead of the process's CPU time")] = False,
    threads: Annotated[int, typer.Option(help="of every runtime; more than one needs --wall")] = 1,
    peers: Annotated[bool, typer.Option("--peers", help="also torch.ao, onnxruntime's quantizer and nncf")] = False,
    seed: Annotated[int, typer.Option(help="of weights, images and the order of bursts")] = 0,
    output: Annotated[Path | None, typer.Option(help="folder for the files [default: runs/bench/<model>]")] = None,
) -> None:
    """Measure latency and size of every backend, beside float eager and onnxruntime fp32 in the same run."""
    from .bench import command

    if (source is None) == (model is None):
        raise FxQuantError("give what is to be measured: a finished run, or --model NAME, and not both")
    if source is not None and (bits is not None or image_size is not None):
        raise FxQuantError("a finished run has its own widths and input size; leave out --bits and --image-size")
    settings = command.Settings(command.numbers(batch, "--batch"), rounds, threads, wall, seed, burst)
    widths = command.numbers(bits or "8,4", "--bits")
    names = None if backends is None else [name.strip() for name in backends.split(",")]
    with out.status("bench") as status:
        result = command.bench(
            settings,
            source=source,
            model=model,
            image_size=image_size,
            bits=widths,
            backends=names,
            peers=peers,
            watch=status.update if out.is_terminal else err.print,  # a log shows how far it got, too
        )
    for table in command.tables(result):
        out.print(table)
    for line in (*command.remarks(result), *command.write(result, output)):
        out.print(line, markup=False, highlight=False)


@bench_app.command("step")
def bench_step(
    model: Annotated[str, typer.Option(help="a timm model, with random weights")],
    image_size: Annotated[int, typer.Option(help="pixels a side; 0 is the model's own")] = 0,
    batch: Annotated[int, typer.Option(help="images a step")] = 32,
    bits: Annotated[int, typer.Option(help="width of all layers but the first and last, which have 8")] = 4,
    estimators: Annotated[str, typer.Option(help="names with commas")] = "lsq,pege,gdnsq,nipq",
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="torch.ao's fused and learnable quantizers")] = True,
    rounds: Annotated[int, typer.Option(help="bursts of each contender")] = 10,
    burst: Annotated[float, typer.Option(help="milliseconds a burst is to take")] = 500.0,
    threads: Annotated[int, typer.Option(help="of torch; wall time instead of CPU time with more than one")] = 1,
    autocast: Annotated[str, typer.Option(help="bf16 or fp16 for convolutions and products")] = "",
    compiled: Annotated[bool, typer.Option("--compile", help="run our quantizers as train.compile does")] = False,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="images and convolutions lie so in memory")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda: device events and allocated memory")] = "cpu",
    seed: Annotated[int, typer.Option(help="of weights, images and the order of bursts")] = 0,
    output: Annotated[Path | None, typer.Option(help="folder of step.json [default: runs/bench/<model>]")] = None,
) -> None:
    """Measure a training step: the float model's, torch.ao's, and that of each estimator; time and peak memory."""
    from .bench import artefacts, step
    from .compiler import require_compiler

    names = step.contenders([name.strip() for name in estimators.split(",")], peers=peers)
    job = step.StepJob(model, image_size, batch, bits, threads, seed, autocast, device, compiled, channels_last)
    settings = step.StepSettings(rounds, burst)
    artefacts.of_model(model, image_size or None, Path())  # the name and the size, before processes are started
    if compiled:
        require_compiler("compiled quantizers were asked for")
    with out.status("bench step") as status:
        result = step.measure(job, names, settings, status.update if out.is_terminal else err.print)
    file = (output or Path("runs") / "bench" / model) / "step.json"
    write_json(file, result.to_json())
    out.print(result.table())
    for line in (*result.remarks(), f"written to {file}"):
        out.print(line, markup=False, highlight=False)


@bench_app.command("accuracy")
def bench_accuracy(
    recipes: Annotated[list[Path], typer.Argument(help="recipe files, that of a float row among them")],
    seeds: Annotated[int, typer.Option(help="runs of each recipe, with seeds 0, 1, ...")] = 1,
    epochs: Annotated[int | None, typer.Option(help="of every recipe, in the place of its own")] = None,
    output: Annotated[Path, typer.Option(help="folder of the runs and of the table")] = Path("runs/bench/accuracy"),
    overrides: Overrides = None,
) -> None:
    """Train recipes, over seeds, and make one table of them; runs that are there already are kept or resumed."""
    from .bench import accuracy

    chosen = accuracy.recipes_of(recipes, seeds, overrides, epochs)
    with _Bars(out) as bars:
        results = accuracy.carry_out(
            chosen,
            output,
            progress=bars,
            watch=lambda line: err.print(line, markup=False),
            so_far=lambda found: accuracy.write(accuracy.rows(found), output),
        )
    table = accuracy.rows(results)
    files = accuracy.write(table, output)
    out.print(accuracy.markdown(table), markup=False, highlight=False, soft_wrap=True)
    out.print(f"written to {', '.join(map(str, files))}", markup=False, highlight=False)
    accuracy.require_exact(table)


@app.command("report")
def report_command(
    folders: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="folder of a finished run; others to compare it with")
    ],
    output: Annotated[Path | None, typer.Option(help="the page [default: report.html in the run]")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the same numbers as JSON")] = None,
    text: Annotated[bool, typer.Option("--text", help="print the same numbers as tables")] = False,
) -> None:
    """Write one HTML page on a run: accuracy, bits, capacity and its cut, costs, parity. It needs no network."""
    from . import html, run_report

    run, *others = folders
    data = run_report.collect(run, others)
    if text:
        for table in run_report.tables(data):
            out.print(table)
    if json_file is not None:
        write_json(json_file, data)
    page = output or run / "report.html"
    write_text(page, html.page(data))
    out.print(f"written to {page}", markup=False, highlight=False)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="folders of finished runs", show_default=False)],
) -> None:
    """Print one table over finished runs: mean and standard deviation over seeds."""
    out.print(report.comparison_table([checkpoint.read_result(folder) for folder in folders]))


def _summary(recipe: Recipe, outcome: VerifyReport, float_accuracy: float | None) -> Table:
    table = Table(title=f"{recipe.name}, seed {recipe.seed}, {outcome.images} held-out images", title_justify="left")
    for heading in ("model", "accuracy %", "argmax as reference %", "logits equal %", "max codes off"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    if float_accuracy is not None:
        table.add_row("float", f"{float_accuracy:.2f}", "-", "-", "-")
    if outcome.fake_quant_accuracy is not None:
        exact = "0 (bit-exact)" if outcome.reference_equals_fake_quant else "DIFFERS"
        table.add_row("fake-quant, frozen", f"{outcome.fake_quant_accuracy:.2f}", "-", "-", exact)
    table.add_row("reference integers", f"{outcome.reference_accuracy:.2f}", "100", "100", "0")
    for backend, parity in outcome.lowered.items():
        table.add_row(
            f"lowered, {backend}",
            f"{parity.accuracy:.2f}",
            f"{parity.argmax_agreement:.2f}",
            f"{parity.logits_equal:.2f}",
            "-" if parity.max_code_difference is None else str(parity.max_code_difference),
        )
    return table


class _Bars:
    """A progress bar a stage, with loss parts and mean widths beside it."""

    def __init__(self, console: Console):
        self.bars = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[values]}"),
            console=console,
        )
        self.task = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *exc) -> None:
        self.bars.stop()

    def start(self, stage: str, steps: int, done: int = 0) -> None:
        self.bars.start()
        self.task = self.bars.add_task(stage, total=steps, completed=done, values="")

    def step(self, values: dict[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.bars.update(self.task, advance=1, values=shown)

    def prepared(self, model: fx.GraphModule) -> None:
        self.bars.console.print(report.layer_table(model, "Prepared: which rule each layer got"))

    def note(self, text: str) -> None:
        self.bars.console.print(text, markup=False)


__all__: list[str] = ["app", "main"]

if __name__ == "__main__":
    main()
