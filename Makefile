# `make demo` and `make test` set everything up on a fresh machine. VENV, FLOOR and PYTHON may be overridden.
VENV ?= .venv
# As VENV, with the oldest versions of the libraries that `setup.py` admits.
FLOOR ?= .venv-floor
PYTHON ?= python3
BIN := $(VENV)/bin
# What inference needs is installed, and, for the rest, what training and the tests need.
USABLE := $(VENV)/.usable
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
# Of what pip prints, a line for every package and the end.
NAMES := grep --line-buffered -E '^(Collecting|Successfully)'

# Tests that depend on what libraries do; the rest depends on our code.
LIBRARY_TESTS := $(addprefix tests/test_,$(addsuffix .py,library_contracts loading modeling generation official_parity read_parity layer_states head_sam \
	official_tokenizer head_sam2 families family_processing results processing pipeline trainer peft quantization merge_lora distributed hub_closure publish \
	publish_trainer publish_data metrics_modules jsonl data_prepare scenes bundled main documented_commands))

.PHONY: demo test test-floor check bench fuzz style tiny-checkpoint clean

demo: $(USABLE)
	@echo '--- Asking the bundled model for "the small red boat" in examples/scene.png: about 15 seconds.'
	$(BIN)/python -m uground examples/scene.png "the small red boat" --output overlay.png

test: $(READY)
	$(BIN)/python -m pytest -n 2

test-floor: $(FLOOR)/.ready
	$(FLOOR)/bin/python -m pytest -n 2 $(LIBRARY_TESTS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/check_imports.py
	$(BIN)/python tests/check_types.py

bench: $(READY)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

# 10,000 broken and whole inputs, in a few minutes; no part of CI.
fuzz: $(READY)
	$(BIN)/python benchmarks/fuzz.py --count 10000 --seed 0

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The bundled checkpoint from nothing, in runs/tiny/checkpoint. May be killed and given again: it goes on where it was.
tiny-checkpoint: $(READY)
	$(BIN)/python -m uground.training.scenes.make_tiny --runs runs/tiny

$(USABLE) $(READY): setup.py pyproject.toml constraints.txt
$(FLOOR)/.ready: setup.py pyproject.toml constraints-floor.txt
$(USABLE): EXTRAS :=
$(READY) $(FLOOR)/.ready: EXTRAS := [test]
$(USABLE) $(READY) $(FLOOR)/.ready:
	@echo '--- Setting up $(@D), once: one to five minutes, 1 to 2 GB on disk (more where PyTorch brings CUDA).'
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --disable-pip-version-check -c $(filter constraints%,$^) -e '.$(EXTRAS)' | $(NAMES)
	touch $(@D)/.usable $@

clean:
	rm -rf $(VENV) $(FLOOR) build *.egg-info .pytest_cache .ruff_cache
