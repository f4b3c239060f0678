"""How a machine starts: EFI variables, boot entries, the EFI system partition, kexec."""
