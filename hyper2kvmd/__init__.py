"""hyper2kvmd: takes virtual machines exported by hypersdk and brings them up on KVM."""

__version__ = "0.1.0"
