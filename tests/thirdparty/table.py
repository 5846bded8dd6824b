"""Train models of other packages with every accelerator, a process each, and write what it did to them: one command.

    python tests/thirdparty/table.py --out third_party               # all of them, installed first
    python tests/thirdparty/table.py --out third_party darts pitch   # some; the table holds what the folder holds

Each package is installed into a virtual environment of its own, layered on the one that runs this: torch and Lightning
stay as they are. Packages' own code is not touched. Rows go to ``OUT/NAME.json``, the table to ``OUT/table.md``.
"""

import argparse
import ast
import json
import os
import site
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = ("torch", "lightning", "pytorch-lightning")  # as they are here
MODULES = {path.stem.removeprefix("of_"): path for path in sorted((HERE / "packages").glob("of_*.py"))}
MODULES["pitch"] = HERE / "pretrained" / "pitch.py"  # an experiment with a table of its own
DECIDING = 6  # pairs, the fewest that a verdict can be made of
SAID = 200  # characters of a reason
HEAD = """# Models of other packages

What each accelerator did to models of packages that know nothing of it, trained by the packages' own calls with one
more callback or a strategy, on small made data. Written by

```bash
python tests/thirdparty/table.py --out third_party && cp third_party/table.md tests/thirdparty/README.md
```

Fits are short (20 to 120 steps, from scratch), so `RankQuantization()` stands aside in all of them and says so;
"kept" is `RankQuantization(2.0, when=1, on_loss="keep")`, which switches in the second epoch although that is not paid
back. Numbers over 1 are faster than plain training; "step" is the last third of the fit's steps, "whole fit" has set-up
and starts of workers in it; brackets are 95 % intervals over pairs with equal seeds. Differences are of the metric on
held-out data, positive is worse. So short a fit does not tell what a long one ends with.

Not here: lightly, anomalib and careamics need torchvision, whose wheels on PyPI do not load beside a CPU build of
torch.
"""


def constant_of(path: Path, name: str) -> Any:
    """Read a constant of a module whose imports may not be there yet."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.Assign):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=True))
        else:
            pairs = [(target, node.value)]
        for left, right in pairs:
            if isinstance(left, ast.Name) and left.id == name:
                return ast.literal_eval(right)
    raise ValueError(f"{path} has no constant {name}: see the other modules beside it.")


def make_environment(folder: Path, installs: tuple[tuple[str, ...], ...]) -> Path:
    """Return the interpreter of a virtual environment over this one, with the packages in it."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, clear=True)
        packages = next((folder / "lib").glob("python*")) / "site-packages"
        below = [f"site.addsitedir({path!r})" for path in site.getsitepackages() if Path(path).is_dir()]
        (packages / "layer.pth").write_text(f"import site; {'; '.join(below)}\n")
        constraints = folder / "constraints.txt"
        constraints.write_text("".join(f"{name}=={metadata.version(name).split('+')[0]}\n" for name in KEPT))
        for arguments in installs:
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--prefer-binary"]
            subprocess.run([*pip, "-c", str(constraints), *arguments], check=True)
        (folder / "installed").touch()
    return python


def run(name: str, python: Path, out: Path, pairs: int) -> bool:
    """Measure one package in a process of its own; return whether that came to its end."""
    path = MODULES[name]
    what = (
        [str(HERE / "package_run.py"), path.stem, "--pairs", str(pairs)] if path.stem == f"of_{name}" else [str(path)]
    )
    command = [str(python), *what, "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with (out.with_suffix(".log")).open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    is_done = done.returncode == 0
    print(f"{name}: {'done' if is_done else f'failed, see {log.name}'}", flush=True)
    return is_done


def interval(value: dict | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def reason(row: dict) -> str:
    """Return the words in which an accelerator said why it stands aside or refuses, short."""
    if row["verdict"].startswith(("refuses", "can not")):
        said = row["verdict"]
    elif row["verdict"] == "crashes":
        said = row["error"]
    else:
        lines = [line for line in row["said"] if line.split(" ")[0].rstrip(":") in row["arm"]]
        said = lines[-1].split(" ", 1)[-1] if lines else ""
    said = " ".join(said.split()).replace("|", "/")
    return said if len(said) <= SAID else said[:SAID].rsplit(" ", 1)[0] + " ..."


def cell(row: dict) -> str:
    """Say in a few words what one accelerator did to one package."""
    if row["verdict"].startswith("acts"):
        return interval(row["step_ratio"] or row["fit_ratio"])
    return row["verdict"].split(":")[0]


def table(results: list[dict]) -> str:
    """Return the page: a row a package, then a row an accelerator of each package."""
    rows = [row for result in results for row in result["rows"]]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    packages = list(dict.fromkeys(row["package"] for row in rows))
    found = {(row["package"], row["arm"]): row for row in rows}
    pairs = [row["fit_ratio"]["pairs"] for row in rows if row["fit_ratio"]]
    lines = [HEAD]
    if pairs and min(pairs) < DECIDING:
        lines += [
            f"**Pairs: {min(pairs)} to {max(pairs)}. Under {DECIDING} they show what runs, and not how fast.**",
            "",
        ]
    lines += ["## In short: steps, or whole fits where workers train", ""]
    lines += ["| package | field, model | " + " | ".join(f"`{arm}`" for arm in arms) + " |"]
    lines.append("|---|---|" + "---|" * len(arms))
    for package in packages:
        first = next(row for row in rows if row["package"] == package)
        cells = " | ".join(cell(found[package, arm]) if (package, arm) in found else "" for arm in arms)
        lines.append(f"| {package} {first['version']} | {first['field']}, {first['model']} | {cells} |")
    lines += ["", "## In full", "", "| package | accelerator | acted on | step | whole fit | metric | its difference |"]
    lines[-1] += " saved, loaded | verdict, or the reason in its own words |"
    lines.append("|---|---|---|---:|---:|---|---:|---|---|")
    for row in rows:
        last = row["verdict"] if row["verdict"].startswith("acts") else f"{row['verdict'].split(':')[0]}: {reason(row)}"
        cells = (
            row["package"],
            row["arm"],
            row["acted_on"],
            interval(row["step_ratio"]),
            interval(row["fit_ratio"]),
            row["metric"] and f"{row['metric']} {row['plain_score']:.3g}",
            interval(row["score_difference"], 4),
            row["saved_and_loaded"],
            last,
        )
        lines.append("| " + " | ".join(cells) + " |")
    where = results[0]["environment"] if results else {}
    lines += ["", "Measured on: " + ", ".join(f"{key} {value}" for key, value in where.items()) + "."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", choices=[*MODULES, []], help="all of them where none is named")
    parser.add_argument("--out", type=Path, required=True, help="folder of rows and table")
    parser.add_argument("--environments", type=Path, help="folder of the virtual environments; in OUT by default")
    parser.add_argument("--pairs", type=int, default=6, help="trainings of each arm; at least 6 for a verdict")
    parser.add_argument("--only-install", action="store_true", help="make the environments and measure nothing")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    environments = given.environments or given.out / "environments"
    failed = []
    for name in given.packages or MODULES:
        python = make_environment((environments / name).resolve(), constant_of(MODULES[name], "INSTALL"))
        if given.only_install:
            continue
        if not run(name, python, (given.out / f"{name}.json").resolve(), given.pairs):
            failed.append(name)
    results = [json.loads(path.read_text()) for path in sorted(given.out.glob("*.json"))]
    results = [result for result in results if "rows" in result]
    experiments = [path.read_text() for path in sorted(given.out.glob("*.md")) if path.stem in MODULES]
    (given.out / "table.md").write_text("\n".join([table(results), *experiments]))
    print(f"{given.out / 'table.md'}: {sum(len(result['rows']) for result in results)} rows", flush=True)
    if failed:
        sys.exit(f"no rows of {', '.join(failed)}: see the logs beside the table.")


if __name__ == "__main__":
    main()
