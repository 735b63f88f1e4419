"""Measure, and print tables: `python -m benchmarks [search] [helpers] [slots] [sweep] [panels]`, all if none is named.

With --store each table goes into README, in the place of the one that is there.
"""

import argparse

from benchmarks import explore, panels, report, slots, spte_arrays, sweep

PARTS = {
    "search": explore.measure,
    "helpers": spte_arrays.measure,
    "slots": slots.measure,
    "sweep": sweep.measure,
    "panels": panels.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, and print tables.")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--store", action="store_true", help="put the tables into README.md")
    given = parser.parse_args()
    for part in given.parts or PARTS:
        text = PARTS[part]()
        report.progress()
        print(f"{text}\n", flush=True)
        if given.store:
            report.store(part, text)


if __name__ == "__main__":
    main()
