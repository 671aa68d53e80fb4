"""Tables of the second study's runs.

    python -m studies.2.report
    python -m studies.2.report --part validation --out DIR   # for choosing

``table.md``: every arm minus plain, per data set and pooled over seeds, with 95% intervals.
``differences.csv``: the same with p, as it is and adjusted for the number of arms.
``reanalysis.csv`` and ``.md``: pooled over data sets with random effects, see reanalysis.py.

Hardware and time: a minute on a CPU. Expected: docs/evidence.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas

from studies.common.names import GLOSSARY, in_words
from studies.common.records import difference_text, raw_runs, read_runs, spread

from .paired import CONFIRMED, SCALED, Difference, Key, Runs, Setting, by_setting, compare, values
from .reanalysis import reanalysis, reanalysis_table
from .run import ARMS, HERE, RUNS

# -- settings --------------------------------------------------------------------------------------

BLOCKS = (  # of the table: few columns, so that a page shows them whole
    (("balanced accuracy", "clean"), ("balanced accuracy", "corrupted")),
    (("AUROC", "corrupted"), ("retained", "corrupted")),
    (("calibration error", "clean"), ("calibration error", "corrupted")),
)


def in_order(arms: Sequence[str]) -> list[str]:
    """Arms as run.py lists them, combinations after the first of theirs."""
    places = {arm: place for place, arm in enumerate((*ARMS, SCALED))}
    return sorted(arms, key=lambda arm: (places.get(arm.split(" + ")[0], len(places)), arm))


# -- tables ----------------------------------------------------------------------------------------


def write_csv(found: Mapping[Key, Difference], path: Path) -> None:
    """One line for each difference."""
    names = ("setting", "arm", "measure", "images")
    numbers = ["n", "mean", "low", "high", "sd", "p", "p_adjusted"]
    rows = [dict(zip(names, key, strict=True)) | vars(one) for key, one in found.items()]
    columns = [*names, *numbers]
    pandas.DataFrame(rows)[columns].to_csv(path, index=False, float_format="%.5f")


def text_of(one: Difference) -> str:
    """Mean and interval; bold where the adjusted p is below 5%."""
    text = difference_text({k: v for k, v in vars(one).items() if v is not None})
    return f"**{text}**" if one.p_adjusted is not None and one.p_adjusted < 0.05 else text


def table(settings: Mapping[Setting, Runs], found: Mapping[Key, Difference], part: str) -> str:
    """Markdown: the figures of plain training, then every arm's differences from them."""
    by_name = {str(setting): runs for setting, runs in settings.items()}
    lines = []
    for name in dict.fromkeys(key[0] for key in found):
        arms = in_order(list(dict.fromkeys(key[1] for key in found if key[0] == name)))
        lines += [f"### {name}", ""]
        for claims in BLOCKS:
            heads = ["arm", *(f"{measure}, {where}" for measure, where in claims), "pairs"]
            lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
            if name in by_name:
                scores = [values(result, part) for result in by_name[name]["plain"].values()]
                own = [spread([score[claim] for score in scores]) for claim in claims]
                cells = [in_words("plain"), *own, str(len(scores))]
                lines.append(f"| {' | '.join(cells)} |")
            for arm in arms:
                here = [found.get((name, arm, *claim)) for claim in claims]
                if any(here):
                    pairs = max(one.n for one in here if one)
                    cells = [in_words(arm), *(text_of(one) if one else "" for one in here)]
                    lines.append(f"| {' | '.join([*cells, str(pairs)])} |")
            lines.append("")
    lines.append(
        f"Paired differences from {in_words('plain')} with their 95% interval, {part} part; its "
        "own row: means ± standard deviations. Bold: p below 5% after adjustment for the number of "
        "arms. Retained: the share of the clean balanced accuracy that is left under corruption. "
        f"{GLOSSARY}"
    )
    return "\n".join(lines) + "\n"


# -- what is asked for -----------------------------------------------------------------------------


def write_report(options: argparse.Namespace) -> None:
    """differences.csv, table.md, reanalysis.csv and reanalysis.md."""
    settings = by_setting(raw_runs(options.runs) if options.runs else read_runs(RUNS))
    differences = compare(settings, options.part)
    if not differences:
        raise SystemExit("there is no run of 'plain' and another arm to compare")
    write_csv(differences, options.out / "differences.csv")
    if options.part == "test" and any(s.dataset in CONFIRMED for s in settings):
        rows = reanalysis(settings)
        frame = pandas.DataFrame(rows)
        frame.to_csv(options.out / "reanalysis.csv", index=False, float_format="%.5f")
        (options.out / "reanalysis.md").write_text(reanalysis_table(rows))
    text = table(settings, differences, options.part)
    (options.out / "table.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--runs", type=Path, help="folder of JSON files (default: the study's runs.jsonl.gz)"
    )
    parser.add_argument(
        "--part",
        choices=["validation", "test"],
        default="test",
        help="of the images; choices are made on validation (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="where to write (default: the study's folder)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_report(options)


if __name__ == "__main__":
    main()
