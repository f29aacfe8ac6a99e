"""Looking into and fixing guests, inside a libguestfs appliance."""
