//! A filter that knows system calls by their numbers alone, as a search tree.
//!
//! The kernel runs a new filter once for each number that there is, to note which are always allowed, and translates it, each
//! time that a session is started. A list of 400 comparisons, as seccompiler makes it, costs more than half a millisecond then;
//! a tree over the ranges that have one verdict is a fifth as long and nine steps deep.

use std::collections::BTreeMap;

use seccompiler::{BpfProgram, SeccompAction, TargetArch, sock_filter};

use crate::filter::FilterError;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const NOT_BELOW: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

const fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// As the kernel numbers them, linux/audit.h.
fn audit(architecture: TargetArch) -> u32 {
    match architecture {
        TargetArch::x86_64 => 0xc000_003e,
        TargetArch::aarch64 => 0xc000_00b7,
        TargetArch::riscv64 => 0xc000_00f3,
    }
}

/// First number of each range and its verdict, up to the next range's first.
fn ranges(
    verdicts: &BTreeMap<i64, SeccompAction>,
    others: &SeccompAction,
) -> Result<Vec<(u32, u32)>, FilterError> {
    let others = u32::from(others.clone());
    let mut ranges = vec![(0, others)];
    let mut begin = |number: u32, verdict: u32| {
        if ranges.last().is_some_and(|(first, _)| *first == number) {
            ranges.pop();
        }
        if ranges.last().is_none_or(|(_, last)| *last != verdict) {
            ranges.push((number, verdict));
        }
    };
    for (number, verdict) in verdicts {
        let number = u32::try_from(*number).map_err(crate::filter::failed("built"))?;
        begin(number, verdict.clone().into());
        begin(number + 1, others);
    }
    Ok(ranges)
}

fn search(ranges: &[(u32, u32)], program: &mut BpfProgram) -> Result<(), FilterError> {
    if let [(_, verdict)] = ranges {
        program.push(statement(RETURN, *verdict));
        return Ok(());
    }
    let (below, from) = ranges.split_at(ranges.len() / 2);
    let node = program.len();
    program.push(statement(NOT_BELOW, from[0].0));
    search(below, program)?;
    program[node].jt = u8::try_from(program.len() - node - 1).map_err(crate::filter::failed("built"))?;
    search(from, program)
}

/// The verdict of each number, and of all others. A call by another architecture's numbers kills the process.
pub fn compile(
    verdicts: &BTreeMap<i64, SeccompAction>,
    others: &SeccompAction,
    architecture: TargetArch,
) -> Result<BpfProgram, FilterError> {
    let mut program = vec![
        statement(LOAD, ARCHITECTURE),
        sock_filter { code: EQUAL, jt: 1, jf: 0, k: audit(architecture) },
        statement(RETURN, SeccompAction::KillProcess.into()),
        statement(LOAD, NUMBER),
    ];
    search(&ranges(verdicts, others)?, &mut program)?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer, and after how many steps.
    fn run(program: &[sock_filter], architecture: u32, number: u32) -> (u32, usize) {
        let (mut position, mut accumulator) = (0, 0);
        for steps in 1..=program.len() {
            let sock_filter { code, jt, jf, k } = program[position].clone();
            position += 1;
            match code {
                LOAD if k == NUMBER => accumulator = number,
                LOAD if k == ARCHITECTURE => accumulator = architecture,
                EQUAL => position += usize::from(if accumulator == k { jt } else { jf }),
                NOT_BELOW => position += usize::from(if accumulator >= k { jt } else { jf }),
                RETURN => return (k, steps),
                _ => panic!("an instruction that is never made: {code:#x} {k}"),
            }
        }
        panic!("no end");
    }

    #[test]
    fn every_number_has_its_verdict() {
        let errno = SeccompAction::Errno;
        // Neighbours alike and not, an end of a range beside the next, the first number and one far away.
        let sparse =
            [(0, errno(1)), (1, errno(1)), (2, errno(2)), (4, SeccompAction::Allow), (1000, errno(1))];
        let alternating = (0..500).step_by(2).map(|number| (number, SeccompAction::Allow));
        for verdicts in [BTreeMap::new(), BTreeMap::from(sparse), alternating.collect()] {
            let others = errno(38);
            let compiled = compile(&verdicts, &others, TargetArch::x86_64);
            if verdicts.len() > 200 {
                assert!(compiled.is_err(), "a jump that is too far is refused");
                continue;
            }
            let program = compiled.unwrap();
            // The x32 numbers, which begin at bit 30, and the highest.
            let far = [0x4000_0000, 0x4000_0001, u32::MAX];
            for number in (0..2_000).chain(far) {
                let wanted = verdicts.get(&i64::from(number)).unwrap_or(&others);
                let (found, _) = run(&program, 0xc000_003e, number);
                assert_eq!(found, u32::from(wanted.clone()), "{number}");
            }
            assert_eq!(run(&program, 0x4000_0003, 1).0, u32::from(SeccompAction::KillProcess));
        }
    }
}
