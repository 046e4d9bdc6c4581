//! The effect of a change on a map, and what one decree may change: pure functions, with the same result on every
//! host.

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::alloc::{AllocMap, Block, Change, Refusal};
use ovl_proto::id::{NetworkId, NodeId};

use ovl_cluster::addresses;

/// The maximum number of new blocks per claim. A host that requests more gets this many, and may repeat the request.
/// Without the limit, a number in a request would determine the size of the map.
pub const MAX_BLOCKS_PER_CLAIM: usize = 1024;

/// Returns the next map with one change applied; `None` if the change has no effect.
///
/// # Errors
///
/// If the change is refused.
pub fn apply(map: &AllocMap, change: &Change) -> Result<Option<AllocMap>, Refusal> {
    let (next, mut results) = apply_all(map, [change]);
    match results.pop() {
        Some(Err(refusal)) => Err(refusal),
        Some(Ok(())) | None => Ok(next),
    }
}

/// Returns the next map with the changes applied in order, and the result of each. The map is `None` if no change has
/// an effect.
///
/// It stops before a change that must not be in the same decree as an earlier one, see [`is_step`]. Then there are
/// fewer results than changes, and at least one.
pub fn apply_all<'a>(
    map: &AllocMap,
    changes: impl IntoIterator<Item = &'a Change>,
) -> (Option<AllocMap>, Vec<Result<(), Refusal>>) {
    let mut next = map.clone();
    let (mut changed, mut freed) = (false, false);
    let mut results = Vec::new();
    for change in changes {
        let wait = match change {
            Change::Claim { .. } | Change::ClaimExact { .. } => freed,
            Change::Forget(node) | Change::Ban(node) => {
                next.members.contains(node) && !map.members.contains(node)
            }
            Change::Admit(node) => map.banned.contains(node) && !next.banned.contains(node),
            Change::Unban(_) | Change::Release { .. } | Change::DropNetwork(_) | Change::Key { .. } => false,
        };
        if wait {
            break;
        }
        let result = make(&mut next, change);
        if result == Ok(true) {
            changed = true;
            freed |= matches!(
                change,
                Change::Forget(_) | Change::Ban(_) | Change::Release { .. } | Change::DropNetwork(_)
            );
        }
        results.push(result.map(|_| ()));
    }
    next.version = next.version.saturating_add(1);
    next.unknown = next.unknown.played();
    next.previous_members.clone_from(&map.members);
    (changed.then_some(next), results)
}

/// Whether one decree may replace a map by another one. An acceptor votes for no other map, so a single proposer
/// cannot make an arbitrary one.
///
/// A block never goes from one holder to another in one decree: it is free in between. A removed member is
/// forgotten, a banned one stays out, and every block is held by a member and overlaps no other one.
pub fn is_step(map: &AllocMap, next: &AllocMap) -> bool {
    let follows = next.cluster == map.cluster
        && next.origin == map.origin
        && map.version.checked_add(1) == Some(next.version)
        && next.previous_members == map.members;
    let members = !next.members.is_empty()
        && map.members.difference(&next.members).all(|gone| next.forgotten.contains(gone))
        && map.forgotten.difference(&next.forgotten).all(|back| next.members.contains(back))
        && next.forgotten.difference(&map.forgotten).all(|gone| map.members.contains(gone))
        && next.forgotten.is_disjoint(&next.members)
        && next.banned.is_subset(&next.forgotten)
        && map.banned.is_disjoint(&next.members);
    follows && members && are_blocks_valid(next) && is_no_block_taken(map, next)
}

/// Whether members hold all blocks, and no two blocks overlap. Blocks that overlap are neighbours in the order of the
/// map.
fn are_blocks_valid(map: &AllocMap) -> bool {
    let disjoint = map.blocks.keys().zip(map.blocks.keys().skip(1)).all(|(a, b)| {
        a.network != b.network || !(a.prefix.contains(&b.prefix) || b.prefix.contains(&a.prefix))
    });
    let held = |(block, owner): (&Block, &NodeId)| {
        block.prefix == block.prefix.trunc() && map.members.contains(owner)
    };
    disjoint && map.blocks.iter().all(held)
}

fn is_no_block_taken(map: &AllocMap, next: &AllocMap) -> bool {
    let mut new = next.blocks.iter().filter(|(block, owner)| map.blocks.get(block) != Some(owner));
    new.all(|(block, owner)| {
        overlapping(map, block.network, block.prefix).all(|(_, holder)| holder == *owner)
    })
}

/// Applies a change to the map in place. Returns whether the map changed. A refused change leaves the map
/// unmodified.
fn make(map: &mut AllocMap, change: &Change) -> Result<bool, Refusal> {
    match change {
        Change::Admit(node) => {
            if map.banned.contains(node) {
                return Err(Refusal::Banned(*node));
            }
            map.forgotten.remove(node);
            Ok(map.members.insert(*node))
        }
        Change::Forget(node) => forget(map, *node),
        Change::Ban(node) => {
            let forgot = forget(map, *node)?;
            Ok(map.forgotten.contains(node) && map.banned.insert(*node) || forgot)
        }
        Change::Unban(node) => Ok(map.banned.remove(node)),
        Change::Claim { network, subnet, block_length, owner, blocks } => {
            let claim = BlockClaim {
                network: *network,
                subnet: subnet.trunc(),
                block_length: *block_length,
                owner: *owner,
            };
            claim.apply_to(map, *blocks)
        }
        Change::ClaimExact { block, owner } => claim_exact(map, *block, *owner),
        Change::Release { block, owner } => {
            let held = map.blocks.get(block) == Some(owner);
            if held {
                map.blocks.remove(block);
            }
            Ok(held)
        }
        Change::DropNetwork(network) => {
            let before = map.blocks.len();
            map.blocks.retain(|block, _| block.network != *network);
            Ok(map.blocks.len() != before)
        }
        Change::Key { from, to } => match map.key {
            Some(agreed) if agreed.commitment == to.commitment => Ok(false),
            Some(agreed) if Some(agreed.id) != *from => Err(Refusal::AnotherKey(agreed.id)),
            _ => {
                map.key = Some(*to);
                // From now on only hosts with the new key are admitted, and banned hosts were not given it.
                map.banned.clear();
                Ok(true)
            }
        },
    }
}

fn forget(map: &mut AllocMap, node: NodeId) -> Result<bool, Refusal> {
    if !map.members.contains(&node) {
        return Ok(false);
    }
    if map.members.len() == 1 {
        return Err(Refusal::LastMember(node));
    }
    map.members.remove(&node);
    map.forgotten.insert(node);
    map.blocks.retain(|_, owner| *owner != node);
    Ok(true)
}

fn claim_exact(map: &mut AllocMap, block: Block, owner: NodeId) -> Result<bool, Refusal> {
    if !map.members.contains(&owner) {
        return Err(Refusal::NotMember(owner));
    }
    if block.prefix != block.prefix.trunc() {
        return Err(Refusal::NotABlock(block.prefix));
    }
    let conflict = overlapping(map, block.network, block.prefix).next();
    match conflict {
        Some((held, holder)) if holder == owner && held.contains(&block.prefix) => Ok(false),
        Some((held, holder)) => Err(Refusal::Held { prefix: held, holder }),
        None => {
            map.blocks.insert(block, owner);
            Ok(true)
        }
    }
}

/// A claim of any blocks of a subnet: [`Change::Claim`].
struct BlockClaim {
    network: NetworkId,
    subnet: IpNet,
    block_length: u8,
    owner: NodeId,
}

impl BlockClaim {
    fn apply_to(&self, map: &mut AllocMap, blocks: u32) -> Result<bool, Refusal> {
        if !map.members.contains(&self.owner) {
            return Err(Refusal::NotMember(self.owner));
        }
        if self.block_length < self.subnet.prefix_len() || self.block_length > self.subnet.max_prefix_len() {
            return Err(Refusal::NotABlock(self.subnet));
        }
        let held: Vec<(IpNet, NodeId)> = overlapping(map, self.network, self.subnet).collect();
        let own = held.iter().filter(|(_, owner)| *owner == self.owner).count();
        let wanted = (blocks as usize).saturating_sub(own).min(MAX_BLOCKS_PER_CLAIM);
        let free = self.first_free(&held, wanted);
        if free.len() < wanted {
            return Err(Refusal::Full { subnet: self.subnet, blocks: self.count() });
        }
        for prefix in &free {
            map.blocks.insert(Block { network: self.network, prefix: *prefix }, self.owner);
        }
        Ok(!free.is_empty())
    }

    /// Returns the lowest blocks of the subnet that overlap none of `held`, which is sorted. It walks along the gaps
    /// between them, because the blocks of an IPv6 subnet are too many to enumerate.
    fn first_free(&self, held: &[(IpNet, NodeId)], wanted: usize) -> Vec<IpNet> {
        let (start, end) = addresses::span(self.subnet);
        let (_, last_of_first) = addresses::span(self.block(start));
        let mask = last_of_first ^ start;
        let mut free = Vec::new();
        let mut next = Some(start);
        // The final `None` represents the end of the subnet.
        let spans = held.iter().map(|(prefix, _)| Some(addresses::span(*prefix))).chain([None]);
        for span in spans {
            while let Some(at) = next.filter(|at| *at <= end && free.len() < wanted) {
                if span.is_some_and(|(first, _)| at | mask >= first) {
                    break;
                }
                free.push(self.block(at));
                next = (at | mask).checked_add(1);
            }
            if let Some((_, last)) = span {
                let behind = (last | mask).checked_add(1);
                next = next.and_then(|at| Some(at.max(behind?)));
            }
        }
        free
    }

    fn block(&self, first: u128) -> IpNet {
        let at: IpAddr = addresses::address(self.subnet, first);
        IpNet::new(at, self.block_length).unwrap_or(self.subnet)
    }

    fn count(&self) -> u64 {
        let bits = u32::from(self.block_length - self.subnet.prefix_len());
        1_u64.checked_shl(bits).unwrap_or(u64::MAX)
    }
}

/// Returns the blocks of a network that overlap a range, sorted by address. Blocks never overlap each other, so at
/// most one of them begins before the range.
fn overlapping(
    map: &AllocMap,
    network: NetworkId,
    range: IpNet,
) -> impl Iterator<Item = (IpNet, NodeId)> + '_ {
    let bound =
        |address: IpAddr, length| Block { network, prefix: IpNet::new(address, length).unwrap_or(range) };
    let longest = range.max_prefix_len();
    let before = map
        .blocks
        .range(bound(addresses::address(range, 0), 0)..bound(range.network(), 0))
        .next_back()
        .filter(move |(block, _)| block.prefix.contains(&range));
    let from_start = map.blocks.range(bound(range.network(), 0)..=bound(range.broadcast(), longest));
    before.into_iter().chain(from_start).map(|(block, owner)| (block.prefix, *owner))
}
