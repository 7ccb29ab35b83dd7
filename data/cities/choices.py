"""400 multiple-choice items from questions.jsonl: population or country, three wrong values of
other cities. Also ten solved examples, and a task for lm-evaluation-harness.

    python data/cities/choices.py        writes data/cities/choices/
"""

import argparse
import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from common import make_directory, read_rows, run  # noqa: E402

TASK = """task: cities_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {items}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def item(row, others, rng):
    """One item: the right value among three of other cities, in random order."""
    right = row["sentences"][0]
    wrong = sorted({other["sentences"][0] for other in others} - {right})
    sentences = rng.sample([right, *rng.sample(wrong, 3)], 4)
    choices = [row["city"] + sentence for sentence in sentences]
    return dict(question=row["question"], choices=choices, answer=sentences.index(right))


def main(argv=None):
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], **form)
    p.add_argument("--out", default=str(HERE / "choices"), help="the directory to write")
    out = Path(p.parse_args(argv).out)
    questions = HERE / "questions.jsonl"
    schema = dict(question=str, sentences=list, relation=str, city=str)
    rows = read_rows(questions, schema, f"run python {HERE}/prepare.py")
    rng = random.Random(5)
    made = dict(items=[], examples=[])
    for relation in ("population", "country"):
        others = [row for row in rows if row["relation"] == relation]
        made["items"] += [item(row, others, rng) for row in others[:200]]
        made["examples"] += [item(row, others, rng) for row in others[-5:]]
    make_directory(out)
    for name, items in made.items():
        rng.shuffle(items)
        lines = [json.dumps(x, ensure_ascii=False) + "\n" for x in items]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    task = TASK.format(items=(out / "items.jsonl").resolve())
    (out / "cities_choice.yaml").write_text(task, encoding="utf-8")
    counts = f"{len(made['items'])} items, {len(made['examples'])} examples"
    print(f"{out}: {counts}, a task of lm-evaluation-harness")


if __name__ == "__main__":
    run(main)
