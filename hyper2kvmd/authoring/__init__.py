"""Writing manifests: what puts one together, makes one for disks that came without, and changes one."""
