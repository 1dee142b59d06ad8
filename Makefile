# The two commands of the README, and what they stand on.
.PHONY: demo test setup check conformance

demo: setup
	cargo build --release --locked
	examples/demo.sh

test: setup
	cargo test --locked
	tests/conformance/run.sh

setup:
	@native/setup.sh

check: setup
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked --document-private-items
