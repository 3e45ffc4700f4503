"""LLaMA Board with L-MTP: a panel in the Train tab, per-head curves, and the heads in the Export and Chat tabs."""
