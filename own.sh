#!/usr/bin/env bash
# Your own text: from a folder to a model that answers from it. Also called by
#     make own TEXT=folder MINUTES=30 MODEL=
#
#     bash own.sh TEXT [MINUTES] [MODEL]
#
# TEXT: a file or folder (see data/text/readme.md). MINUTES: of training, both stages together.
# MODEL: a checkpoint to start from instead of nothing; its tokenizer is taken, too.
# Every step is a command of its own. Stopped at any moment and called again with the same text,
# minutes and model, it goes on. What was made of others is moved into OUT/old-1, -2 ..., and is
# made anew; nothing is removed.
set -euo pipefail
trap 'exit 130' INT

step() { printf '\n== %s\n' "$*"; }
run() { printf '+ python'; printf ' %q' "$@"; echo; "$PY" "$HERE/$1" "${@:2}"; }
fail() { echo "own.sh: $*" >&2; exit 1; }

TEXT=${1:?give a file or a folder of text: bash own.sh TEXT [MINUTES] [MODEL]}
MINUTES=${2:-30}
MODEL=${3:-}
HERE=$(cd "$(dirname "$0")" && pwd)
test -e "$TEXT" || fail "TEXT=$TEXT: no such file or folder"
[[ $MINUTES =~ ^[0-9]*\.?[0-9]+$ ]] && awk "BEGIN { exit !($MINUTES >= 0.001 && $MINUTES <= 1e6) }" ||
  fail "MINUTES=$MINUTES: give a number from 0.001 to 1000000"
NAME=$(basename "$(cd "$(dirname "$TEXT")" && pwd)/$(basename "$TEXT")")
if test -d "$TEXT"; then NAME=$(basename "$(cd "$TEXT" && pwd)"); fi  # of . and .., too
NAME=${NAME#"${NAME%%[!.]*}"}  # .notes: notes
NAME=${NAME%%.*}
NAME=${NAME//[[:space:]]/_}
OUT=${OUT:-out/${NAME:-text}}
PREPARE=${PREPARE:-}     # more flags of data/text/prepare.py, such as --min_words 10
TRAIN=${TRAIN:-}         # more flags of train.py
QUESTIONS=${QUESTIONS:-200}
PY=${PY:-$HERE/.venv/bin/python}
test -x "$PY" || PY=python3

# A new model gets the lengths of the toy; one that is there has its own.
CHUNK=32
REF=64
CONTEXT=256
TOKENIZER=${TOKENIZER:-}
INIT=()
if test -n "$MODEL"; then
  test -e "$MODEL" || fail "MODEL=$MODEL: no such checkpoint"
  FOLDER=$MODEL
  test -d "$MODEL" || FOLDER=$(dirname "$MODEL")
  if test -d "$OUT"; then
    case $(cd "$FOLDER" && pwd -P)/ in
      "$(cd "$OUT" && pwd -P)"/old-*) ;;
      "$(cd "$OUT" && pwd -P)"/*)
        fail "MODEL=$MODEL is in $OUT, of which all is made anew: give another folder, OUT=..." ;;
    esac
  fi
  if test -f "$FOLDER/tokenizer.json"; then TOKENIZER=$FOLDER/tokenizer.json; fi
  test -n "$TOKENIZER" ||
    fail "$MODEL has no tokenizer.json: give TOKENIZER=, the data set it was trained on"
  read -r CHUNK REF CONTEXT < <("$PY" "$HERE/data/text/shape.py" --init "$MODEL" --lengths)
  INIT=(--init "$MODEL")
fi
# shellcheck disable=SC2206
READ=("$TEXT" --out "$OUT" --tokenizer "${TOKENIZER:-bpe:4096}" --ref_len "$REF" $PREPARE)

# What is there fits if it was made of the same: made_of says of what, a line each for the text (and
# how it was read) and for the training.
aside() {  # WHY FILES: moves these files of OUT to where they can be found
  local why=$1 old=1 name moved=""
  shift
  while test -e "$OUT/old-$old"; do old=$((old + 1)); done
  for name in "$@"; do
    test -e "$OUT/$name" || continue
    mkdir -p "$OUT/old-$old"
    mv "$OUT/$name" "$OUT/old-$old/"
    moved=yes
  done
  if test -n "$moved"; then
    echo "own.sh: made of $why: what was in $OUT is in $OUT/old-$old now, and is made anew"
    if test -d "$OUT/old-$old/model"; then echo "own.sh: its model is $OUT/old-$old/model"; fi
  fi
}
FINGERPRINT=$("$PY" "$HERE/data/text/prepare.py" "${READ[@]}" --fingerprint)
HOW="$MINUTES minutes, model ${MODEL:-none}, windows of $CONTEXT, chunks of $CHUNK, flags ${TRAIN:-none}"
if test -f "$OUT/made_of"; then
  TEXT_BEFORE=$(sed -n 1p "$OUT/made_of")
  HOW_BEFORE=$(sed -n 2p "$OUT/made_of")
else  # a data set of prepare.py, or nothing
  TEXT_BEFORE=$(sed -n 's/^ "prepared": "\(.*\)"$/\1/p' "$OUT/meta.json" 2>/dev/null || true)
  HOW_BEFORE=""
  if test -z "$TEXT_BEFORE" && test -n "$(ls -A "$OUT" 2>/dev/null)"; then
    fail "$OUT is there, and is not of this script: give another, OUT=..., or remove it"
  fi
fi
if test "$TEXT_BEFORE" != "$FINGERPRINT"; then
  if test -e "$OUT/meta.json" || test -e "$OUT/implicit" || test -e "$OUT/model"; then
    ALL=()
    for path in "$OUT"/*; do
      case ${path##*/} in
        old-* | made_of) ;;
        *) ALL+=("${path##*/}") ;;
      esac
    done
    aside "another text, or read otherwise" "${ALL[@]}"
  fi
elif test "$HOW_BEFORE" != "$HOW"; then
  ALL=(shape.txt implicit model kb.bank kb.bank.new bank_of eval.json)
  for path in "$OUT"/*.neighbors.*; do ALL+=("${path##*/}"); done
  aside "${HOW_BEFORE:-something else}" "${ALL[@]}"
fi
mkdir -p "$OUT"
printf '%s\n' "$FINGERPRINT" "$HOW" > "$OUT/made_of.new"
mv "$OUT/made_of.new" "$OUT/made_of"

step "1 of 7: tokens and references (sec. 4)"
run data/text/prepare.py "${READ[@]}"

step "2 of 7: what the text and $MINUTES minutes can feed"
if ! test -s "$OUT/shape.txt"; then
  run data/text/shape.py --data "$OUT" --minutes "$MINUTES" ${INIT[@]+"${INIT[@]}"} --file "$OUT/shape.txt" \
    --chunk_len "$CHUNK" --ref_len "$REF" --context "$CONTEXT"
fi
# the model's shape; flags of both stages; the minutes of each
{ read -r SHAPE; read -r WINDOWS; read -r IMPLICIT EXPLICIT; } < "$OUT/shape.txt"
echo "$SHAPE $WINDOWS"
SPLITS=${WINDOWS##*--val }

step "3 of 7: index, and the neighbours of every chunk of training text (sec. 3.6)"
for references in train_refs kb; do
  test -f "$OUT/$references.index/meta.json" ||
    run retrieval.py index --data "$OUT" --references $references
done
for split in train heldout val; do
  references=kb
  if test $split = train; then references=train_refs; fi
  [[ ,train,$SPLITS, == *,$split,* ]] || continue  # the others are shorter than a window
  test -f "$OUT/$split.neighbors.bin" ||
    run retrieval.py neighbors --data "$OUT" --split $split --references $references \
      --chunk_len "$CHUNK" --context "$CONTEXT"
done
if [[ ,$SPLITS, == *,heldout,* ]]; then
  run data/text/overlaps.py --data "$OUT" --chunk_len "$CHUNK" --context "$CONTEXT" --chunks 200
fi

step "4 of 7: training, implicit stage, then explicit stage (sec. 3.6)"
# shellcheck disable=SC2086
run train.py ${INIT[@]+"${INIT[@]}"} $SHAPE $WINDOWS --data "$OUT" --stage implicit --split train \
  --minutes "$IMPLICIT" --out "$OUT/implicit" $TRAIN
# the shape is that of the implicit stage's checkpoint
# shellcheck disable=SC2086
run train.py --init "$OUT/implicit" $WINDOWS --data "$OUT" --stage explicit --split train \
  --minutes "$EXPLICIT" --decay 0.4 --lr 1e-3 --out "$OUT/model" $TRAIN
cp "$OUT/tokenizer.json" "$OUT/model/"   # so that MODEL=$OUT/model can be gone on with, in another OUT

step "5 of 7: the knowledge base becomes memories (sec. 3.1)"
WEIGHTS=$(grep '"weights"' "$OUT/model/meta.json")
if test -d "$OUT/kb.bank.new" && ! test -d "$OUT/kb.bank"; then  # killed between two moves
  mv "$OUT/kb.bank.new" "$OUT/kb.bank"
fi
if test -d "$OUT/kb.bank" && test "$(cat "$OUT/bank_of" 2>/dev/null)" != "$WEIGHTS"; then
  # of the model as it was before more training: its texts, added ones too, in memories of this one
  rm -rf "$OUT/kb.bank.new"  # unfinished
  run write.py --checkpoint "$OUT/model" --data "$OUT" --references "$OUT/kb.bank" \
    --out "$OUT/kb.bank.new"
  aside "the model before more training" kb.bank
  mv "$OUT/kb.bank.new" "$OUT/kb.bank"
  echo "$WEIGHTS" > "$OUT/bank_of"
else
  echo "$WEIGHTS" > "$OUT/bank_of"
  run write.py --checkpoint "$OUT/model" --data "$OUT" --out "$OUT/kb.bank"
fi

step "6 of 7: is the memory used? Sentences that no training text has, cut off before a fact"
if test -f "$OUT/heldout.bin"; then
  run eval.py --checkpoint "$OUT/model" --data "$OUT" --bank "$OUT/kb.bank" \
    --questions "$QUESTIONS" --examples 0 --json "$OUT/eval.json" ||
    echo "no table, for the reason above; the model can be asked all the same"
else
  echo "no table: nothing is held out of the training text, which has every answer"
fi

step "7 of 7: three questions"
while read -r prompt; do
  IFS=$'\t' read -r prompt truth <<< "$prompt"
  run sample.py --checkpoint "$OUT/model" --data "$OUT" --bank "$OUT/kb.bank" --prompt="$prompt"
  echo "    (truth: $truth)"
done < "$OUT/prompts.txt"

step "Go on"
# the same call again, with what was set for it
AGAIN="bash $(printf '%q ' "$0" "$TEXT" "$MINUTES")"
if test -n "$MODEL"; then AGAIN+=$(printf '%q ' "$MODEL"); fi
for name in OUT PREPARE TRAIN TOKENIZER QUESTIONS; do
  if test -n "${!name}"; then AGAIN="$name=$(printf '%q' "${!name}") $AGAIN"; fi
done
Q=$(printf '%q' "$OUT")
cat <<END
ask:    python sample.py --checkpoint $Q/model --data $Q --bank $Q/kb.bank --prompt "..."
train:  python train.py --resume $Q/model --minutes $(awk "BEGIN { print 2 * $EXPLICIT }")
then    $AGAIN
        which writes the memories of the model as it is then, and asks again
END
