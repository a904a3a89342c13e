"""`python -m jaxinfer` is `jaxinfer`."""

from jaxinfer.cli import main

if __name__ == "__main__":
    main()
