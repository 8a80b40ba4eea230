# `make demo` and `make test` set everything up on a fresh machine. VENV and PYTHON may be overridden.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test check bench fuzz style tiny-checkpoint clean

demo: $(READY)
	$(BIN)/python -m uground examples/scene.png "the small red boat" --output overlay.png

test: $(READY)
	$(BIN)/python -m pytest -n 2

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/check_imports.py

bench: $(READY)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script; done

# 10,000 broken and whole inputs, in a few minutes; no part of CI.
fuzz: $(READY)
	$(BIN)/python benchmarks/fuzz.py --count 10000 --seed 0

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The bundled checkpoint from nothing: SAM and vision tower, an untrained model of them, then fine-tuning.
tiny-checkpoint: $(READY)
	$(BIN)/python -m uground.training.pretrain sam --output runs/tiny/sam --steps 1600 --batch-size 16
	$(BIN)/python -m uground.training.pretrain vision --output runs/tiny/vision --steps 2000 --batch-size 32
	$(BIN)/python -m uground.training.tiny_model --sam runs/tiny/sam --vision runs/tiny/vision --output runs/tiny/start
	$(BIN)/accelerate launch -m uground.training.finetune --config recipes/tiny.yaml
	$(BIN)/accelerate launch -m uground.training.finetune --config recipes/tiny-joint.yaml
	$(BIN)/accelerate launch -m uground.training.finetune --config recipes/tiny-presence.yaml
	$(BIN)/python -m uground.hub.closure runs/tiny/finetuned --from-nothing --dataset scenes --license apache-2.0 \
		--recipe recipes/tiny-presence.yaml

$(READY): setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
