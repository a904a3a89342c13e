"""The gRPC edge: `app.run` serves until a signal, `app.Server` is the same in pieces."""
