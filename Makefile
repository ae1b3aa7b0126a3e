# Every target uses the tools of the active environment, made by `pip install -e '.[dev]'`.
.PHONY: check test smoke format

check:  ## formatting, lint, types, who imports whom
	ruff format --check .
	ruff check .
	mypy
	lint-imports

test:  ## every test
	python -m pytest

smoke:  ## the whole pipeline, a few steps of each stage, into a temporary folder
	out=$$(mktemp -d); \
	perl-vlm vqa run --out "$$out/run" --rm.steps 4 --rm.eval_pairs 64 --ppo.steps 2 --eval.limit 64; \
	status=$$?; rm -rf "$$out"; exit $$status

format:  ## rewrite the files in the house format
	ruff format .
	ruff check --fix .
