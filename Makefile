# make demo     set up, write 20,000 references into memory, ask 600 facts
# make test     set up, run the tests but the slow ones
# make kernels  compile the CUDA kernels (needs nvcc, no GPU)
# make toy      train the shipped toy again, both stages, into out/
# make own      train on your own text and ask it: make own TEXT=folder MINUTES=30

PY := .venv/bin/python
DATA := data/cities

.PHONY: setup demo test kernels toy own

setup: .venv/ready

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(DATA)/meta.json: $(DATA)/prepare.py $(DATA)/wordings.py $(DATA)/tokenizer.json | .venv/ready
	$(PY) $(DATA)/prepare.py

demo: .venv/ready $(DATA)/meta.json
	$(PY) write.py --checkpoint checkpoints/toy --codec Residual2x10,PQ16x8
	$(PY) eval.py --json out/demo.json

test: .venv/ready
	$(PY) -m pytest -q -m "not slow" tests

# Which GPUs: CUDA_ARCHS=80,90 (setup.py).
kernels: .venv/ready
	USE_CUDA=1 $(PY) setup.py --quiet build_ext --inplace

# Both stages with the seeds of the shipped toy. A stopped run goes on where it was.
toy: .venv/ready
	test -f $(DATA)/explicit.bin || $(PY) $(DATA)/prepare.py --train
	for s in explicit_val explicit_heldout; do $(PY) retrieval.py neighbors --data $(DATA) \
		--references kb --split $$s --chunk_len 32 --context 256; done
	test -f $(DATA)/explicit.neighbors.bin || $(PY) retrieval.py neighbors --data $(DATA) \
		--references train_refs --split explicit --chunk_len 32 --context 256
	$(PY) train.py --preset toy --stage implicit --out out/implicit --steps 700 --batch 64 \
		--lr 3e-3 --decay 0.2 --compile
	$(PY) train.py --init out/implicit --stage explicit --out out/toy --steps 2400 --batch 64 \
		--lr 2e-3 --decay 0.4 --compile
	cp $(DATA)/tokenizer.json out/toy/

# Your own text (own.sh): make own TEXT=folder MINUTES=30 MODEL=
own: .venv/ready
	$(PY) -c "import tokenizers" 2>/dev/null || .venv/bin/pip install --quiet tokenizers
	bash own.sh "$(TEXT)" "$(or $(MINUTES),30)" "$(MODEL)"
