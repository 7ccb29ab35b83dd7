"""400 multiple-choice items from questions.jsonl: population or country, three wrong values of
other cities. Also ten solved examples, and a task for lm-evaluation-harness.

    python data/cities/choices.py        writes data/cities/choices/
"""

import json
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
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
    right = row["sentences"][0]
    wrong = rng.sample(sorted({r["sentences"][0] for r in others} - {right}), 3)
    choices = [row["city"] + sentence for sentence in rng.sample([right, *wrong], 4)]
    return dict(
        question=row["question"], choices=choices, answer=choices.index(row["city"] + right)
    )


def main():
    rng, items, examples, out = random.Random(5), [], [], HERE / "choices"
    if not (HERE / "questions.jsonl").exists():
        raise FileNotFoundError(f"{HERE}/questions.jsonl is missing: first python prepare.py")
    rows = [json.loads(line) for line in open(HERE / "questions.jsonl")]
    for relation in ("population", "country"):
        of = [row for row in rows if row["relation"] == relation]
        items += [item(row, of, rng) for row in of[:200]]
        examples += [item(row, of, rng) for row in of[-5:]]
    out.mkdir(exist_ok=True)
    for name, made in (("items", items), ("examples", examples)):
        rng.shuffle(made)
        lines = [json.dumps(x, ensure_ascii=False) + "\n" for x in made]
        (out / f"{name}.jsonl").write_text("".join(lines))
    (out / "cities_choice.yaml").write_text(TASK.format(items=out / "items.jsonl"))
    print(f"{out}: {len(items)} items, {len(examples)} examples, a task of lm-evaluation-harness")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        sys.exit(f"choices.py: {e}")
