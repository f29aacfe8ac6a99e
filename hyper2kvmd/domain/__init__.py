"""The libvirt domain of a migrated VM: values, decisions and XML, without libvirt."""
