"""Looking into and mending guests, inside a libguestfs appliance."""
