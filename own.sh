#!/usr/bin/env bash
# Your own text: from a folder to a model that answers from it. Also called by
#     make own TEXT=folder MINUTES=30 MODEL=
#
#     bash own.sh TEXT [MINUTES] [MODEL]
#
# TEXT: a file or folder (see data/text/readme.md). MINUTES: of training, both stages together.
# MODEL: a checkpoint to start from instead of nothing; its tokenizer is taken, too.
# Every step is a command of its own. Stopped at any moment and called again, it goes on.
set -euo pipefail

TEXT=${1:?give a file or a folder of text: bash own.sh TEXT [MINUTES] [MODEL]}
MINUTES=${2:-30}
MODEL=${3:-}
HERE=$(cd "$(dirname "$0")" && pwd)
NAME=$(basename "${TEXT%/}")
NAME=${NAME%%.*}
NAME=${NAME// /_}   # flags below are cut at spaces
OUT=${OUT:-out/$NAME}
PREPARE=${PREPARE:-}     # more flags of data/text/prepare.py, such as --min_words 10
TRAIN=${TRAIN:-}         # more flags of train.py
PY=${PY:-$HERE/.venv/bin/python}
test -x "$PY" || PY=python3

step() { printf '\n== %s\n' "$*"; }
run() { printf '+ python'; printf ' %q' "$@"; echo; "$PY" "$HERE/$1" "${@:2}"; }

# A new model gets the lengths of the toy; one that is there has its own.
CHUNK=32
REF=64
CONTEXT=256
TOKENIZER=${TOKENIZER:-bpe:4096}
if test -n "$MODEL"; then
  if test -f "$MODEL/tokenizer.json"; then TOKENIZER=$MODEL/tokenizer.json; fi
  if test "$TOKENIZER" = bpe:4096; then
    echo "own.sh: $MODEL has no tokenizer.json: give TOKENIZER=, the data set it was trained on"
    exit 1
  fi
  read -r CHUNK REF CONTEXT < <("$PY" "$HERE/data/text/shape.py" --init "$MODEL" --lengths)
fi

step "1 of 7: tokens and references (sec. 4)"
# shellcheck disable=SC2086
run data/text/prepare.py "$TEXT" --out "$OUT" --tokenizer "$TOKENIZER" --ref_len "$REF" $PREPARE

step "2 of 7: what the text and $MINUTES minutes can feed"
if ! test -s "$OUT/shape.txt"; then
  run data/text/shape.py --data "$OUT" --minutes "$MINUTES" --init "$MODEL" --file "$OUT/shape.txt" \
    --chunk_len "$CHUNK" --ref_len "$REF" --context "$CONTEXT"
fi
read -r SHAPE < "$OUT/shape.txt"
echo "$SHAPE"

step "3 of 7: index, and the neighbours of every chunk of training text (sec. 3.6)"
for references in train_refs kb; do
  test -f "$OUT/$references.index/meta.json" ||
    run retrieval.py index --data "$OUT" --references $references
done
SPLITS=""
for split in train heldout val; do
  references=kb
  if test $split = train; then references=train_refs; fi
  test -f "$OUT/$split.bin" || continue
  if test $split != train; then SPLITS=$SPLITS,$split; fi
  test -f "$OUT/$split.neighbors.bin" ||
    run retrieval.py neighbors --data "$OUT" --split $split --references $references \
      --chunk_len "$CHUNK" --context "$CONTEXT"
done
SPLITS=${SPLITS#,}
if test -f "$OUT/heldout.bin"; then
  run data/text/overlaps.py --data "$OUT" --chunk_len "$CHUNK" --context "$CONTEXT" --chunks 200
fi

step "4 of 7: training, implicit stage, then explicit stage (sec. 3.6)"
IMPLICIT=$(awk "BEGIN { print 0.6 * $MINUTES }")
EXPLICIT=$(awk "BEGIN { print 0.4 * $MINUTES }")
# shellcheck disable=SC2086
run train.py $SHAPE --data "$OUT" --stage implicit --split train --val "$SPLITS" \
  --minutes "$IMPLICIT" --out "$OUT/implicit" $TRAIN
# the shape is that of the implicit stage's checkpoint; window and warmup are the same
WARMUP=${SHAPE##*--warmup }
# shellcheck disable=SC2086
run train.py --init "$OUT/implicit" --data "$OUT" --stage explicit --split train --val "$SPLITS" \
  --context "$CONTEXT" --warmup "$WARMUP" --minutes "$EXPLICIT" --decay 0.4 --lr 1e-3 \
  --out "$OUT/model" $TRAIN
cp "$OUT/tokenizer.json" "$OUT/model/"   # so that MODEL=$OUT/model can be gone on with

step "5 of 7: the knowledge base becomes memories (sec. 3.1)"
run write.py --checkpoint "$OUT/model" --data "$OUT" --out "$OUT/kb.bank"

step "6 of 7: is the memory used? Sentences that no training text has, cut off before a fact"
run eval.py --checkpoint "$OUT/model" --data "$OUT" --bank "$OUT/kb.bank" \
  --questions "${QUESTIONS:-200}" --examples 0 --json "$OUT/eval.json"

step "7 of 7: three questions"
while read -r prompt; do
  run sample.py --checkpoint "$OUT/model" --data "$OUT" --bank "$OUT/kb.bank" --prompt "$prompt"
done < "$OUT/prompts.txt"

step "Go on"
cat <<END
ask:    python sample.py --checkpoint $OUT/model --data $OUT --bank $OUT/kb.bank --prompt "..."
train:  python train.py --resume $OUT/model --minutes $(awk "BEGIN { print 2 * $EXPLICIT }")
END
