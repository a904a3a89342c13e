"""The messages and stubs of `jaxinfer.v1`, written by scripts/proto from proto/."""
