"""Speech: files, batches of waveforms, transcripts and letters."""
