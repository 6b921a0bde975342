"""LoRA and its kin: small trained changes of a frozen network's layers."""
