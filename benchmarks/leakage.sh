# What each party of each system sees, and what is reconstructed from it: the table of docs/systems.md.
#     bash benchmarks/leakage.sh cifar10_test_first2000.npz runs/systems
set -e
D=${1:-../shared/data/images/cifar10/cifar10_test_first2000.npz}; O=${2:-runs/systems}
W="--data $D --model lenet:activation=gelu --num-classes 10 --input-shape 3,16,16 --examples 400 --clients 8 --steps 12 --every 12 --record middle --record-clients 2 --speed-spread 0.5"
leakaudit simulate ssgd $W --batch-size 1 --out $O/ssgd
leakaudit simulate ssgd $W --batch-size 1 --topology all-reduce --out $O/ssgd-ring-of-8
leakaudit simulate ssgd $W --batch-size 1 --topology all-reduce --clients 2 --out $O/ssgd-ring-of-2
leakaudit simulate asgd $W --batch-size 1 --out $O/asgd
leakaudit simulate dssgd $W --batch-size 1 --out $O/dssgd
leakaudit simulate dssgd $W --batch-size 1 --topology all-reduce --out $O/dssgd-ring-of-8
leakaudit simulate dts $W --batch-size 1 --out $O/dts
leakaudit simulate dgc $W --batch-size 1 --out $O/dgc
leakaudit simulate fedavg $W --batch-size 1 --local-steps 4 --out $O/fedavg
leakaudit simulate fedbuff $W --batch-size 1 --local-steps 4 --out $O/fedbuff
leakaudit simulate secagg $W --batch-size 1 --local-steps 1 --cohort 3 --out $O/secagg-of-3
leakaudit simulate secagg $W --batch-size 1 --local-steps 4 --cohort 8 --out $O/secagg-of-8
leakaudit simulate async-secagg $W --batch-size 1 --local-steps 4 --out $O/async-secagg
leakaudit simulate leakage $O/* --attack tv-path:iterations=15 --budget 60 --out $O-leakage
