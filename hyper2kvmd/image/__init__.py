"""Disk images: what their headers say, opened safely, and what qemu-img does with them."""
