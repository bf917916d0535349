# Every target sets up what it needs in .venv; nothing has to be installed first but Python 3.10 or newer.
PYTHON ?= python3
SECONDS ?= 300
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What the table of accuracy in reports/ is made from. (Compilers begin anew for every momentum.)
SCENARIOS := caffe-3963 long-constant constant-channel constant-channel-inexact large-offset long-reduction \
	half-precision float64 magnitude-overflow small-n inference inference-at-mean backward running-statistics
SMALL := onnxruntime:real onnxruntime-1.20:real chainer:real mlx:real tinygrad:real jax:jax jax:flax jax:flax-stable
LARGE := jax:flax-nnx jax:haiku jax:keras-jax openvino:real opencv:real ncnn:real paddle:real tensorflow:real \
	torch:torch torch:torch-mkldnn torch:torch-compile torch:keras-torch mindspore:real nnabla:real mxnet:real \
	megengine:real tensorflow-1:real torch-1:real

.PHONY: audit test selftest fuzz lint benchmark frameworks frameworks-small help clean

audit: .venv/torch  ## audit this machine's BatchNorms with all shipped scenarios
	$(BIN)/bnaudit run scenarios/ --json reports/latest.json --fail-on never

test: .venv/test  ## run the tests
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

selftest: .venv/test  ## plant faults and see that the shipped scenarios find every one
	$(BIN)/bnaudit selftest

frameworks: .venv/torch  ## build every framework of frameworks.yaml, audit all, and make the table of accuracy
	$(BIN)/bnaudit run $(SCENARIOS) --config frameworks.yaml $(SMALL:%=-b %) $(LARGE:%=-b %) \
		-k 'not (steps=100 and momentum=null)' --resume \
		--fail-on never --json reports/frameworks.json --accuracy reports/frameworks.md \
		|| test $$? -eq 3 # what crashed, as nnabla does on an empty batch, says so in the table
	gzip --best --no-name --force reports/frameworks.json

frameworks-small: .venv/torch  ## build and audit those that take seconds
	$(BIN)/bnaudit run smoke --config frameworks.yaml $(SMALL:%=-b %) --fail-on never

lint: .venv/dev  ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

benchmark: .venv/test  ## measure the reference against torch, NumPy and a memory copy
	$(BIN)/python benchmarks/throughput.py

fuzz: .venv/fuzz  ## fuzz what reads files and messages for SECONDS=300, guided by coverage
	cd tests && ../$(BIN)/python -m fuzz $(SECONDS)

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 20

clean:  ## remove the environment and everything generated
	rm -rf .venv build dist reports/latest.json reports/frameworks.json .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/torch: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) --editable '.[torch]'
	touch $@

.venv/test: .venv/torch
	$(INSTALL) --editable '.[torch,test,browser]'
	touch $@

.venv/fuzz: .venv/test
	$(INSTALL) --editable '.[torch,test,fuzz]'
	touch $@

.venv/dev: .venv/test
	$(INSTALL) --editable '.[torch,test,browser,dev]'
	touch $@
