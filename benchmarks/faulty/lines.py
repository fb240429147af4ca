"""Bad command lines and configurations: each ends in a result, or in one line that says what is wrong, and exit code 2."""

import contextlib
import io
import json
import os
import random
import re
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

import pfgm
from benchmarks.faulty import kills
from benchmarks.faulty.hostile import flow
from benchmarks.faulty.patience import AtWork, limited
from pfgm.cli import main
from pfgm.cli import train as train_cli
from pfgm.cli.console import is_out_of_memory

WORDS = ["", "0", "-1", "1.5", "nan", "inf", "-inf", "1e999", "99999999999999999999", "none", "null", "true", "[]", "[1"]
WORDS += ["{}", "[1,2,3]", "[[1,2],[3]]", "/dev/null", "..", "x/y/z", "nothing.npy", "a.npy", "bad.npy", "a.png", "b.ckpt"]
WORDS += ["export", "\t", "os.system", "pfgm.nn.UNet", "torch.nn.Linear", "{class_path: os.system}", "é", "--", "-h", "@x"]
WORDS += ["!!x", "{class_path: pfgm.nn.UNet}", "1000000000000000", "9" * 400]
NO_YAML = ["[1, 2]", "a: [", "\0", "x", "- a\n- b", "&a [*a]", "!!python/object/apply:os.system ['touch canary']"]

Line = tuple[str, list[str]]


def prepare(folder: Path) -> list[Line]:
    """Lines that work, in `folder`, with the files that they need."""
    os.chdir(folder)
    flow().save_pretrained("export")
    np.save("a.npy", np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    np.save("bad.npy", np.full((3, 5), np.nan))
    Image.new("L", (4, 4)).save("a.png")
    Path("b.ckpt").write_text("no checkpoint")
    assert kills.finish(kills.command(folder / "run", "denoising", 20)) == 0
    train = ["--trainer.max_steps=21", "--trainer.enable_progress_bar=false", "--run_dir=run", "--trainer.accelerator=cpu"]
    given = [word for word in kills.command(folder / "run", "denoising", 21)[1:] if "run_dir" not in word]
    evaluation = ["--evaluation.n=8", "--evaluation.sets=1", "--evaluation.likelihood=0"]
    last = "run/checkpoints/last.ckpt"
    return [
        ("sample", ["export", "--n=2", "--seed=0", "--out=x.npz", "--preset=fast", "--batch_size=2"]),
        ("sample", ["export", "--seeds=1,2-3", "--out=folder", "--method=ab3", "--steps=3", "--grid=paced", "--share=1/2"]),
        ("sample", [last, "--n=3", "--out=x.png", "--rtol=0.1", "--atol=0.1", "--max_calls=9", "--trajectory=t.npz"]),
        (
            "sample",
            [last, "--n=2", "--method=euler", "--steps=3", "--s_churn=1", "--device=cpu", "--dtype=float32", "--out=x.pt"],
        ),
        ("sample", ["encode", "export", "a.npy", "--out=l.npz", "--rtol=0.1", "--atol=0.1", "--method=dopri5"]),
        ("sample", ["decode", "export", "l.npz", "--out=d.npz", "--rtol=0.1", "--atol=0.1"]),
        ("sample", ["interpolate", "export", "--seeds=1,2", "--points=3", "--out=i.npz", "--preset=fast"]),
        ("sample", ["vary", "export", "a.npy", "--level=1", "--seed=1", "--out=v.npz", "--preset=fast"]),
        ("sample", ["average", "run", "0.1", "--out=averaged", "--step=20"]),
        ("train", ["fit", *given, *train]),
        ("train", ["fit", *given, *train[:2], "--run_dir=new", "--init_from", last]),
        ("train", ["test", *given, *train, *evaluation]),
        ("train", ["advise", "a.npy", "--D=2"]),
        ("train", ["fit", "--config=run.yaml"]),
    ]


def spoil(line: Line, chance: random.Random, configuration: Path) -> Line:
    """One or two changes to a line, or to the configuration that it names."""
    program, words = line[0], list(line[1])
    for _ in range(chance.randrange(1, 3)):
        if not words:
            break
        i = chance.randrange(len(words))
        key, equals, _ = words[i].partition("=")
        kind = chance.randrange(6)
        if "run.yaml" in words[-1]:
            spoil_yaml(configuration, chance)
        elif kind == 0:
            words = words[:i] + words[i + 1 :] if chance.random() < 0.8 else words[:i]
        elif kind == 1:
            words.insert(i, chance.choice(WORDS))
        elif kind == 2 and equals:
            words[i] = f"{key[:-1]}={chance.choice(WORDS)}"
        else:
            words[i] = f"{key}={chance.choice(WORDS)}" if equals else chance.choice(WORDS)
    return program, words


def spoil_yaml(path: Path, chance: random.Random) -> None:
    """Write a configuration with one setting changed, or text that is none."""
    few, all_there_are = kills.ROOT / "configs" / "heart.yaml", Path("run/config.yaml")
    config = yaml.safe_load(chance.choice([few, all_there_are]).read_text()) | {"run_dir": "new"}
    config["trainer"] |= {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False}
    config["data"]["init_args"] = (config["data"].get("init_args") or {}) | {"size": 50, "batch_size": 8}
    section: dict = config
    while True:
        key = chance.choice(sorted(section))
        if not isinstance(section[key], dict) or chance.random() < 0.2:
            break
        section = section[key]
    section[key] = chance.choice([None, -1, 1.5, "x", "", [], [1], {}, {"x": 1}, True, float("nan"), 10**30, "os.system"])
    text = yaml.safe_dump(config)
    if chance.random() < 0.1:
        text = chance.choice(NO_YAML)
    path.write_text(text)


def accidental(error: BaseException | None) -> bool:
    """Whether what a user is told was not meant for one: nobody raised it, or a library that knows nothing of arguments."""
    if error is None or isinstance(error, (OSError, ArgumentError, SystemExit, KeyboardInterrupt)):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(pfgm.__file__).parent in Path(last.filename).parents
    return not (last.line or "").startswith("raise") if ours else not re.search("jsonargparse|lightning|yaml", last.filename)


def attempt(line: Line) -> tuple[str, str]:
    """ "done", "at work" still, out "of memory", "named" (one error, exit code 2), or else; and the end of what was said."""
    program, words = line
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited():
                if program == "sample":
                    main.sample(words)
                else:
                    sys.argv = ["train.py", *words]
                    train_cli.run()
        except SystemExit as end:
            code = end.code or 0
            if end.__context__ is not None and is_out_of_memory(end.__context__):
                return "of memory", ""
            if accidental(end.__context__):
                return "by accident", repr(end.__context__)
        except AtWork:
            return "at work", ""
        except BaseException as other:
            return "traceback", f"{type(other).__name__}: {other}"
        else:
            code = 0
    said = error.getvalue()
    last = said.strip().rpartition("\n")[2].rpartition("\r")[2]
    if "Traceback" in said or code == 1:
        return "traceback", last
    return ("done" if code == 0 else "named" if code == 2 and "error:" in said else f"code {code}"), last


def command_lines(tries: int, seed: int, folder: Path, report: Callable[[str], None] = print) -> Counter:
    """Counts of what `tries` spoiled lines end in; those that end badly are reported."""
    here, argv = Path.cwd(), sys.argv
    chance, counts = random.Random(seed), Counter()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        good = prepare(folder.absolute())
        spoil_yaml(Path("run.yaml"), chance)
        for _ in range(tries):
            line = spoil(chance.choice(good), chance, Path("run.yaml"))
            kind, text = attempt(line)
            counts["tried"] += 1
            counts[kind] += 1
            if kind not in ("done", "at work", "of memory", "named"):
                report(f"{kind}: {line[0]}.py {json.dumps(line[1])}: {text[:200]}")
        counts["executed"] += Path("canary").exists()
    finally:
        os.chdir(here)
        sys.argv = argv
    return counts
