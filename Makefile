# make demo    score -> filter -> report on the sample data
# make test    the test suite
# make bench   speed and memory of scoring beside other ways and the machine's limit, of the report of ten million tokens; 20 minutes
# make check   format, lint, types, tests: what CI runs
# All of them make their own environment in .venv first.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench check format clean

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch .venv/.ready

demo: .venv/.ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" sample_data/demo.sh

test: .venv/.ready
	$(BIN)/python -m pytest

# bfloat16 where the CPU has no instructions for it is slower than float32: it is measured for comparison, briefly.
BENCH = $(BIN)/python -m bench.scoring --model .venv/smollm2
MAIN = padded padded-kl packed ours

bench: .venv/.ready .venv/smollm2/config.json
	$(BIN)/python -m bench.report_ten_million
	$(BIN)/python -m bench.report_ten_million 10000000 10
	$(BENCH) --out cpu-1-float32 --title 'SmolLM2-135M, float32, full vocabulary' --dtype float32 \
		--workloads W1 W2 --modes full --arms $(MAIN) ours-packed ours-torch ours-no-read-ahead
	$(BENCH) --out cpu-2-float32 --title 'SmolLM2-135M, float32, full vocabulary, more workloads' --dtype float32 \
		--workloads W6 W4 W3 --modes full --scale 1/64 --arms $(MAIN)
	$(BENCH) --out cpu-3-modes --title 'SmolLM2-135M, float32, sampled tokens and top 64' --dtype float32 \
		--workloads W2 W6 --modes sampled top64 --arms $(MAIN)
	$(BENCH) --out cpu-4-bfloat16 --title 'SmolLM2-135M, bfloat16' --dtype bfloat16 \
		--workloads W2 --modes full --scale 1/64 --arms $(MAIN)
	$(BENCH) --out cpu-5-long --title 'SmolLM2-135M, float32, long responses' --dtype float32 \
		--workloads W5 --modes full --scale 1/256 --arms $(MAIN)
	$(BENCH) --out cpu-6-memory --title 'Memory with a vocabulary of 152k' --dtype float32 --model wide \
		--workloads W2 --modes full --scale 1 --rounds 1 --arms ours

.venv/smollm2/config.json: .venv/.ready
	$(BIN)/python sample_data/smollm2/checkpoint.py .venv/smollm2

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
