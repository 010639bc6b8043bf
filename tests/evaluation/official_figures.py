"""Outputs and references of our own, and the figures that the official scripts give them.

E2E: `measure_scores.py` of github.com/tuetschek/e2e-metrics (1b9c4d8), its functions
`run_coco_eval` and `run_pymteval` called in Python for all digits, and mteval-v13a-sig.pl for
NIST_mteval, which prints four decimals. WebNLG: evaluation.py, multi-bleu.perl -lc, METEOR 1.5 (-l
en -norm -r 3) and tercom 7.25 as in webnlg-automatic-evaluation of github.com/Yale-LILY/dart
(bb644b1), with the texts below as testdata_with_lex.xml. DART: multi-bleu.perl, prepare_files.py,
METEOR (-r 8) and tercom as in its run_eval_on_dart.sh. OpenJDK 17, Perl 5.36, Python 3.11.
"""

from __future__ import annotations

# (group, output, references)
TEXTS = [
    ("seen", "The Vaults is a pub near Café Adriatic, with a 5 out of 5 rating. Prices start at "
             "£30.",
     ("The Vaults pub near Café Adriatic has a 5 star rating.  Prices start at £30.",
      "Close to Café Adriatic, The Vaults pub serves food from £30; customers rate it 5 out of 5.",
      "The Vaults is a pub that is rated 5 out of 5 and costs more than £30. It's near Café "
      "Adriatic.")),
    ("unseen", "It is not family-friendly!",
     ("The restaurant isn't family-friendly.", "This is not a family-friendly place, sorry.",
      "No, it is not \"family-friendly\".", "Families are not welcome.")),
    ("seen", "Aarhus Airport's runway length is 2702.0 metres",
     ("Aarhus Airport's runway length is 2,702.0.",)),
    ("unseen", "the the the the cat",
     ("There is a cat on the mat.", "The cat, 3½ years old, sits on the mat – always.")),
    ("seen", "in Kraków , Poland , lies the river side “ Wisła ” ; population 1,000,000",
     ("The riverside “Wisła” lies in Kraków, Poland (population: 1,000,000).",
      "Kraków's riverside, in Poland, is called “Wisła”; its population is 1,000,000.")),
    ("unseen", "Sushi & Co. serves Japanese food for less than $20 in the city centre and it has a "
               "high rating",
     ("In the city centre, Sushi & Co. serves Japanese food for less than $20 and has a high "
      "rating.",
      "Sushi & Co., which is highly rated, sells Japanese food in the city centre; it costs less "
      "than $20.")),
    ("seen", "Alan Bean was born in Wheeler, Texas on 1932-03-15 and was selected by NASA in 1963.",
     ("Alan Bean, born in Wheeler, Texas on March 15th 1932, was selected by NASA in 1963.",
      "NASA selected Alan Bean (born 1932-03-15 in Wheeler, Texas) in 1963.",
      "Alan Bean was born on 15 March 1932 in Wheeler, Texas. In 1963 he was selected by NASA.")),
    ("unseen", "A high rated, high rated, high rated coffee shop.",
     ("A highly rated coffee shop.", "It is a coffee shop with a high customer rating.")),
]
OUTPUTS = [output for _, output, _ in TEXTS]
REFERENCES = [references for _, _, references in TEXTS]
GROUPS = [group for group, _, _ in TEXTS]

E2E = {"BLEU": 0.5710999986509915, "NIST": 6.195990041301569, "NIST_mteval": 6.1651,
       "METEOR": 0.45059850565487086,
       "ROUGE_L": 0.6725061938704693, "CIDEr": 3.541159226530798}
WEBNLG = {"all": {"BLEU": 55.35, "METEOR": 0.4202643235305993, "TER": 0.40509554140127385},
          "seen": {"BLEU": 59.94, "METEOR": 0.41435795001164893, "TER": 0.39215686274509803},
          "unseen": {"BLEU": 48.18, "METEOR": 0.43045890967351597, "TER": 0.4233128834355828}}
DART = {"all": {"BLEU": 58.02, "METEOR": 0.4369911896835451, "TER": 0.3913043478260869}}
