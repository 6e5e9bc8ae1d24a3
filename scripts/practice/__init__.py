"""The workshop: a copy of a package with some bodies taken out, to be written by the learner and checked one by one.

    __main__    the command line
    exercises   what an exercise is; tasks_qwen3, tasks_qwen3_moe, tasks_deepseek_v3 have the texts of all
    folder      practice/PACKAGE/: written once, kept, and what a learner has reached
    process     the checks run in a process of their own (worker), which may hang or crash
    graft       one function of the learner in the real module, so that each exercise is checked alone
    judge       compares with the real function, then with the usual mistakes, which checks_* write out
    solutions   what is the body of no package: reference mixture, balance loss, bias update
"""
