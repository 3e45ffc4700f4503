"""Names of the two L-MTP stages."""

STAGES = {1: "lmtp1", 2: "lmtp2"}
STAGE_LABELS = {"L-MTP: Head Warm-up": STAGES[1], "L-MTP: Full Tuning": STAGES[2]}
