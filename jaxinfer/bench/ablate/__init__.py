"""What each lever of the settings is worth: switched off, and on alone, round by round."""
