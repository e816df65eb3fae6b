# `make help` lists what there is. Needs Python 3.10+ and make; everything else lands in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.installed

.PHONY: help demo demo-janus test test-lowest test-highest unit lint types pretrain pretrain-janus pretrain.decoder pretrain.encoders pretrain.janus gate claims ablations bench doctor tensorboard gpu gpu-bench notebooks docs clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed, this is ' + sys.version.split()[0] + '; set PYTHON=python3.x')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev,notebooks]"
	@touch $(READY)

STAGES := configs/stages
demo: $(READY)  ## train the miniature by reconstruction reward: captions, then images (minutes, two CPU cores)
	$(RUN) -m uae.cli fit --config configs/tiny.yaml --trainer.val_check_interval 160 \
		--stage "$(STAGES)/generation_for_understanding.yaml --trainer.max_steps 160" \
		--stage "$(STAGES)/understanding_for_generation.yaml configs/exploration/miniature.yaml configs/finetune/images_full.yaml --model.init_args.reconstructions 16 --trainer.max_steps 160"

demo-janus: $(READY)  ## train the miniature that captions and draws with one network, both at once (minutes, two CPU cores)
	$(RUN) -m uae.cli fit --config configs/tiny_janus.yaml

test: lint types unit  ## everything CI runs

unit: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RUN) -m pytest -m "not gpu" -n 2 --dist loadfile --durations 10

# Old and new libraries warn of each other; only what we call ourselves is held against us here.
DEPRECATED := error:.past_key_values. is deprecated

test-lowest test-highest: test-%: .venv-%/.installed  ## all tests with the lowest, or the newest, versions that pyproject.toml allows
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m "not gpu" -n 2 --dist loadfile -o "filterwarnings=$(DEPRECATED)"

# uv reads the bounds of pyproject.toml, and pip installs what it chose. What is not named there gets its newest version.
.venv-%/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$*/bin/uv pip compile --quiet --extra dev --extra notebooks --output-file .venv-$*/versions.txt \
		--resolution $(if $(filter lowest,$*),lowest-direct,highest) pyproject.toml
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --requirement .venv-$*/versions.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
.PRECIOUS: .venv-%/.installed

lint: $(READY)  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(READY)  ## mypy
	$(RUN) -m mypy

pretrain: $(READY)  ## rebuild the miniature's cold-start weights from nothing (two CPU cores)
	rm -rf uae/miniature/tiny_weights
	$(MAKE) -j2 pretrain.decoder pretrain.encoders
	$(RUN) benchmarks/gate.py tiny

pretrain-janus: pretrain.janus  ## rebuild the weights of the miniature of UMM-2 (one CPU core)
	$(RUN) benchmarks/gate.py janus

pretrain.decoder: PARTS := autoencoder sharpen decoder refine
pretrain.encoders: PARTS := captioner clip judge
pretrain.janus: PARTS := janus_autoencoder janus janus_refine
pretrain.decoder pretrain.encoders pretrain.janus: $(READY)
	for part in $(PARTS); do OMP_NUM_THREADS=1 $(RUN) -m uae.cli fit --config configs/pretrain/$$part.yaml || exit 1; done

gate: $(READY)  ## how good both miniatures are before any reward
	$(RUN) benchmarks/gate.py tiny
	$(RUN) benchmarks/gate.py janus

SEEDS ?= 5
claims: $(READY)  ## the paper's claims in miniature, with controls, over SEEDS seeds (about half an hour each, two CPU cores)
	$(RUN) benchmarks/claims.py --seeds $(shell seq 0 $$(($(SEEDS) - 1)))

ablations: $(READY)  ## what settings of the stages, losses and rewards do, three seeds each; needs the runs of the claims
	$(RUN) benchmarks/ablations.py
	$(RUN) benchmarks/loss_ablations.py

bench: $(READY)  ## how fast we are beside others: tables and curves in benchmarks/results/speed_* (a quarter of an hour, one CPU core)
	for part in grpo_step parts miniature_step curves; do $(RUN) benchmarks/speed/$$part.py || exit 1; done
	OMP_WAIT_POLICY=PASSIVE $(RUN) benchmarks/speed/scoring.py --pairs 100 --parts races

doctor: $(READY)  ## is this machine ready: versions, GPUs, memory, disk, checkpoints, a rollout of the miniature
	$(RUN) -m uae.doctor

tensorboard: $(READY)  ## look at the runs
	$(VENV)/bin/tensorboard --logdir outputs

gpu: $(READY)  ## tests that need a CUDA device
	$(RUN) -m pytest -m gpu

gpu-bench: $(READY)  ## one step of systems of published sizes, random weights, on one GPU of 80 GB (8 minutes each at most)
	$(RUN) -m benchmarks.true_size --device cuda --batch 2 --group 4 --tokens 64 --steps 10 --size 512 --rollouts 2

notebooks: $(READY)  ## execute the notebooks in place
	$(RUN) -m nbconvert --to notebook --execute --inplace notebooks/*.ipynb

docs: $(VENV)/.docs  ## the pages of docs/, all keys and the public classes as a site, in site/index.html
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

$(VENV)/.docs: $(READY)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	@touch $@

clean:  ## remove the environment, the outputs and the site
	rm -rf $(VENV) .venv-lowest .venv-highest outputs site
