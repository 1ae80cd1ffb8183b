"""Ground that every folder may use: errors, components as plain data, memory, files, types."""
