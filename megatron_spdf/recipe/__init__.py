"""What a run is: typed, validated, documented field by field; loaded from configs/*.yaml plus
overrides."""
