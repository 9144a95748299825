"""The paper's ablations on the embedded teacher: results/findings/. Figures 2 and 5, Tables 1, 2, 5, 6 and 7.

    python assets/findings.py                        # make findings: all rows, three seeds; goes on where it stopped
    python assets/findings.py --quick                # QUICK=1 make findings: one seed and few steps, to see it work
    python assets/findings.py --rows table5 --seeds 0 --out /tmp/findings

What findings.json has of this teacher is not run again, unless a row's arguments or its student's first weights have
changed since. Each row is a run of `train.py --preset NAME`: same recipe, same clips and, for a seed, the same
teacher's cache. Rows that come to the same run share it. Runs are compared in pairs of one seed, since seeds differ by
more than rows do. Rows of ours change one more thing at a time, to find out what distillation's gain depends on.
"""
import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt          # noqa: E402
import torch                             # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate                          # noqa: E402
from data import CLIPS_PER_SCENE, HELD_OUT_SEED, SyntheticClips         # noqa: E402
from losses import make_heads            # noqa: E402
from model import TurboVAED, weights_hash         # noqa: E402
from teachers import load_teacher        # noqa: E402
from train import PRESETS, complete, parse_args, student_config          # noqa: E402

TITLES = {"figure2": "Figure 2: depthwise separable blocks, from none to all", "figure5": "Figure 5: distillation",
          "table1": "Table 1: upsampling", "table2": "Table 2: number of training samples",
          "table5": "Table 5: kernel of the depthwise convolutions", "table6": "Table 6: aligned blocks",
          "table7": "Table 7: projection head",
          "ours": "Ours: what distillation's gain depends on"}
EQUATION4 = ["--distill-weight", "1", "--no-normalize"]          # as the paper has it
OURS = {        # flags beside the recipe's
    "ours-weight-0.2": ["--distill-weight", "0.2"],
    "ours-weight-1": ["--distill-weight", "1"],
    "ours-equation4": EQUATION4,
    "ours-adamw-with": ["--muon-lr", "0"],
    "ours-adamw-without": ["--muon-lr", "0", "--distill-weight", "0"],
    "ours-paper-rate-with": ["--muon-lr", "0", "--lr", "2e-4", "--schedule", "constant", *EQUATION4],
    "ours-paper-rate-without": ["--muon-lr", "0", "--lr", "2e-4", "--schedule", "constant", "--distill-weight", "0"],
}
ROWS = {name: row["paper"] for name, row in PRESETS.items()} | dict.fromkeys(OURS)
COMPARED = {    # what a row is compared with, to see what distillation gains there
    "figure5-with": "figure5-without", "ours-weight-0.2": "figure5-without", "ours-weight-1": "figure5-without",
    "ours-equation4": "figure5-without", "ours-adamw-with": "ours-adamw-without",
    "ours-paper-rate-with": "ours-paper-rate-without"}
COMPARED |= {name: "figure5-without" for name in PRESETS if name.startswith("table6")}
FRAMES, SIZE, CROPS = 8, 64, 3          # of a clip; a seed's cache has so many crops of 512 made-up videos
# Beside a preset's own: a tenth of the clips stands for the paper's number of samples.
INSTEAD = {"table2-10k": ["--samples", str(512 * CROPS // 10)]}


def settings_of(row):
    """All of train.py's settings in a row's run."""
    return complete(parse_args(flags_of(row)))


def flags_of(row):
    return OURS[row] if row in OURS else ["--preset", row, *INSTEAD.get(row, [])]


def identity(row):
    """What tells this row's run from others: 12 digits of its arguments, its student and what that begins with."""
    args = settings_of(row)
    config, no_matter = student_config(args), dict.fromkeys(("workers", "device"))
    found = hashlib.sha256(json.dumps(vars(args) | no_matter | {"student": config.__dict__}).encode())
    torch.manual_seed(0)
    for name, tensor in TurboVAED(config).state_dict().items():
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()[:12]


def what_hinders(row, teacher):
    """Why the row's blocks cannot be aligned with the teacher's, or None."""
    args = settings_of(row)
    latents = torch.zeros(1, teacher.latent_channels, 2, 8, 8)
    theirs = {name: f.shape for name, f in teacher.features(latents, args.align).items()}
    ours = {name: student_config(args).feature_shape(name, latents.shape) for name in theirs}
    try:
        make_heads(ours, theirs, args.head)
    except ValueError as error:
        return str(error)


def run_train(out, seed, args, *flags):
    """train.py on one thread, from the seed's cache; its last line is what ends this where it fails."""
    cache = ["--cache", str(args.work / f"cache{seed}-{args.crops}"), "--cache-crops", str(args.crops)]
    clips = ["--frames", str(FRAMES), "--size", str(SIZE), "--warmup", str(max(args.steps // 10, 1))]
    command = [sys.executable, str(ROOT / "train.py"), "--seed", str(seed), *cache, *clips, "--out", str(out), *flags]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{out}: {done.stdout.splitlines()[-1]}")


def train(row, seed, args):
    """The run's folder; trains what of it is still to be trained."""
    run = args.work / f"{row}-{args.identities[row]}-{seed}-{args.steps}"
    log = run / "log.jsonl"
    if not log.exists() or json.loads(log.read_text().splitlines()[-1])["step"] < args.steps:
        resume = "--resume" if (run / "checkpoint.pt").exists() else "--overwrite"
        run_train(run, seed, args, *flags_of(row), "--steps", str(args.steps), "--val-clips", "16",
                  "--eval-every", str(max(args.steps // 10, 1)), resume)
    return run


@torch.no_grad()
def measured(run, clips, latents):
    """{"parameters": of the student, "psnr": mean over held-out clips, "ssim", "curve": {step: validation PSNR}}."""
    student = TurboVAED.from_pretrained(str(run)).eval()
    videos = [student(z) for z in latents]
    found = {"parameters": sum(p.numel() for p in student.parameters())}
    for name, metric in (("psnr", evaluate.psnr), ("ssim", evaluate.ssim)):
        found[name] = statistics.mean(metric(video, clip[None]).item() for video, clip in zip(videos, clips))
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return found | {"curve": {line["step"]: line["psnr"] for line in lines if "psnr" in line}}


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def written(values, decimals):
    """Mean ± standard deviation."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {spread(values):.{decimals}f}" if len(values) > 1 else mean


def pairs(rows, a, b):
    """The runs of two rows that have the same seed: [(a's, b's)]."""
    return [(run, rows[b]["seeds"][seed]) for seed, run in rows[a]["seeds"].items() if seed in rows[b]["seeds"]]


def against(rows, a, b):
    """A line that compares two rows: their order by the paper, if it has them, and by the pairs of our runs."""
    differences = [one["psnr"] - other["psnr"] for one, other in pairs(rows, a, b)]
    if not differences:
        return f"- {a} over {b}: no pair yet"
    mean, deviation = statistics.mean(differences), spread(differences)
    known = rows[a]["paper"] and rows[b]["paper"] and a.split("-")[0] == b.split("-")[0]    # the tables' runs differ
    paper = rows[a]["paper"][0] - rows[b]["paper"][0] if known else 0.0
    start = f"- {a} over {b}: " + (f"paper {paper:+.2f} dB, ours " if known else "")
    if len(differences) < 2:
        return f"{start}{mean:+.2f} dB of one pair"
    verdict = ("within the spread" if abs(mean) <= deviation else "beyond the spread" if not known
               else "agrees" if mean * paper > 0 else "DISAGREES")
    return (f"{start}{mean:+.2f} ± {deviation:.2f} dB of {len(differences)} pairs, "
            f"{abs(mean) / max(deviation, 1e-9):.1f} spreads: {verdict}")


def sooner(rows, a, b):
    """How many times sooner a row is where the other one ends, by validation PSNR, in words."""
    found = []
    for one, other in pairs(rows, a, b):
        last, goal = [(int(step), psnr) for step, psnr in other["curve"].items()][-1]
        before = None
        for step, psnr in ((int(step), psnr) for step, psnr in one["curve"].items()):
            if psnr >= goal:
                share = (goal - before[1]) / (psnr - before[1]) if before else 1.0      # of the steps between the two
                found.append(last / ((1 - share) * before[0] + share * step if before else step))
                break
            before = step, psnr
    several = len(pairs(rows, a, b))
    if not found:
        return "; never there" if several else ""
    return f"; there {written(found, 2)} times sooner" + f" in {len(found)} of {several}" * (len(found) < several)


def recorded(path, found, identities):
    """{row: {seed: what was measured}} of a findings.json, of the rows whose runs would be the same today."""
    held = json.loads(path.read_text()) if path.exists() else {}
    same = all(held.get(key) == found[key] for key in ("teacher_weights", "steps", "runs"))
    rows = held["rows"].items() if same else ()
    return {name: row["seeds"] for name, row in rows if row["run"] == identities.get(name)}


def report(found):
    """RESULTS.md: each table in the paper's form; how neighbours in the paper's order compare, all with its first."""
    lines = ["# The paper's ablations on the embedded teacher", "",
             f"`{found['command']}`: {found['runs']}", "",
             "PSNR and SSIM are of held-out made-up clips: mean over seeds ± standard deviation. The paper's are of",
             "Turbo-VAED-LTX on real video. Comparisons are of runs with the same seed and clips.", ""]
    everything = {name: row for name, row in found["rows"].items() if row["seeds"]}
    for table, title in TITLES.items():
        rows = {name: row for name, row in everything.items() if name.startswith(table)}
        if not rows:
            continue
        lines += [f"## {title}", "", "| preset | decoder (M) | PSNR (dB) | SSIM | the paper's PSNR | SSIM |",
                  "| --- | --- | --- | --- | --- | --- |"]
        for name, row in rows.items():
            psnr, ssim = ([run[metric] for run in row["seeds"].values()] for metric in ("psnr", "ssim"))
            paper = [str(row["paper"][i]) if row["paper"] and row["paper"][i] is not None else "-" for i in (0, 2)]
            lines.append(f"| {name} | {next(iter(row['seeds'].values()))['parameters'] / 1e6:.3f} "
                         f"| {written(psnr, 2)} | {written(ssim, 4)} | {' | '.join(paper)} |")
        # By the paper's numbers; Figure 2's curves have few, and its rows an order of their own.
        order = list(rows) if table == "figure2" else sorted(
            (name for name in rows if rows[name]["paper"]), key=lambda name: -rows[name]["paper"][0])
        gains = [(a, b) for a, b in COMPARED.items() if a in rows and b in everything]
        compared = [*zip(order, order[1:]), *((order[0], name) for name in order[2:])]
        lines += ["", *(against(rows, a, b) for a, b in compared if (a, b) not in gains),
                  *(against(everything, a, b) + sooner(everything, a, b) for a, b in gains), ""]
    lines += [f"Left out: {name}: {why}." for name, why in found["left_out"].items()]
    return "\n".join(lines) + "\n"


def picture(found, path):
    """Each table's rows as points, one for each seed; and Figure 5's curves."""
    tables = [t for t in TITLES if any(n.startswith(t) and r["seeds"] for n, r in found["rows"].items())]
    columns, lines = min(len(tables), 4), -(-len(tables) // 4)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3.3 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(tables):]:
        axis.axis("off")
    for axis, table in zip(axes.flat, tables):
        rows = {name.removeprefix(f"{table}-"): row["seeds"] for name, row in found["rows"].items()
                if name.startswith(table) and row["seeds"]}
        axis.set_title(TITLES[table], fontsize=9)
        if table == "figure5":
            for (name, seeds), colour in zip(rows.items(), ("black", "tab:blue")):
                for i, run in enumerate(seeds.values()):
                    axis.plot([int(step) for step in run["curve"]], run["curve"].values(), color=colour, linewidth=1,
                              label=None if i else name)
            axis.set(xlabel="step", ylabel="validation PSNR in dB")
            axis.legend(fontsize=8)
            continue
        for i, seeds in enumerate(rows.values()):
            psnrs = [run["psnr"] for run in seeds.values()]
            axis.plot([i] * len(psnrs), psnrs, "o", color="tab:blue", markersize=4, alpha=0.6)
            axis.plot([i - 0.2, i + 0.2], [statistics.mean(psnrs)] * 2, color="black")
        axis.set_xticks(range(len(rows)), rows, rotation=20, ha="right", fontsize=8)
        low, high = axis.get_ylim()
        more = max(0.4 - (high - low), 0) / 2                   # at least 0.4 dB, so that noise looks like noise
        axis.set(ylabel="PSNR in dB", ylim=(low - more, high + more))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(found, out):
    (out / "findings.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "RESULTS.md").write_text(report(found))
    picture(found, out / "findings.png")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rows", nargs="+", choices=[*TITLES, *ROWS], metavar="TABLE|ROW", default=list(TITLES),
                   help=f"whole tables, {', '.join(TITLES)}, or rows, such as table5-k5 (default: all tables)")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=400, help="of each run (default: 400)")
    p.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each (default: 2)")
    p.add_argument("--quick", action="store_true", help="seed 0 and 30 steps: shows that all runs, measures nothing")
    p.add_argument("--work", default="out/findings", help="runs and caches (default: out/findings)")
    p.add_argument("--out", help="for findings.json, RESULTS.md, findings.png (default: results/findings; quick: "
                                 "out/findings)")
    args = p.parse_args()
    torch.set_num_threads(1)            # the runs have the others
    args.crops = CROPS
    if args.quick:
        args.seeds, args.steps, args.crops = [0], 30, 1
    out = Path(args.out or ("out/findings" if args.quick else ROOT / "results" / "findings"))
    out.mkdir(parents=True, exist_ok=True)

    teacher = load_teacher("tiny")
    args.work = Path(args.work) / weights_hash(teacher.vae)[:16]       # another teacher's runs are no runs of this one
    rows = [name for name in ROWS if {name, name.split("-")[0]} & set(args.rows)]
    left_out = {name: why for name in rows if (why := what_hinders(name, teacher))}
    rows = [name for name in rows if name not in left_out]
    args.identities = {name: identity(name) for name in ROWS}
    alike = {}                                                  # rows that are the same run
    for name in rows:
        alike.setdefault(args.identities[name], []).append(name)
    # A cache holds the features of the run that makes it: all that any row may ever ask for.
    blocks = {block for name in ROWS if not what_hinders(name, teacher) for block in settings_of(name).align}
    held_out = SyntheticClips(FRAMES, SIZE, HELD_OUT_SEED)
    clips = [held_out[CLIPS_PER_SCENE * i] for i in range(32)]
    latents = [teacher.encode(clip[None]) for clip in clips]
    found = {"command": f"python assets/findings.py --steps {args.steps}", "steps": args.steps,
             "torch": torch.__version__, "teacher_weights": weights_hash(teacher.vae)[:16], "left_out": left_out,
             "runs": f"{args.steps} steps of 4 clips of {FRAMES}x{SIZE}x{SIZE}, {len(clips)} held-out clips"}
    held = recorded(out / "findings.json", found, args.identities)
    found["rows"] = {name: {"paper": ROWS[name], "run": args.identities[name], "seeds": held.get(name, {})}
                     for name in ROWS if name in rows or name in held}
    for names in alike.values():
        seeds = {seed: run for name in names for seed, run in found["rows"][name]["seeds"].items()}
        for name in names:
            found["rows"][name]["seeds"] = dict(seeds)
    for seed in args.seeds:
        missing = [names for names in alike.values() if str(seed) not in found["rows"][names[0]]["seeds"]]
        if missing:
            run_train(args.work / f"cache{seed}-run", seed, args, "--align", *sorted(blocks), "--steps", "1",
                      "--overwrite")
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = pool.map(lambda names: train(names[0], seed, args), missing)
            for i, (names, run) in enumerate(zip(missing, runs), 1):
                result = measured(run, clips, latents)
                print(f"seed {seed}, {i}/{len(missing)}: {names[0]}, {result['psnr']:.2f} dB", flush=True)
                for name in names:
                    found["rows"][name]["seeds"][str(seed)] = result
                write(found, out)
    write(found, out)
    print(f"{out}/RESULTS.md")


if __name__ == "__main__":
    main()
