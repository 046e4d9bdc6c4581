/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* The kernel's helper functions that the programs call, by their numbers (enum bpf_func_id in linux/bpf.h), and what
 * the kernel's headers for programs have of C. Own lines in place of libbpf's headers: compiling needs clang alone. */
#ifndef OVL_HELPERS_H
#define OVL_HELPERS_H

#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))

/* Keeps clang from joining two comparisons of pointers by an "or", which the verifier refuses. */
#define LET_VERIFIER_SEE(pointer) asm volatile("" : "+r"(pointer))

/* Both targets of ovl are little-endian. */
#define be16(x) __builtin_bswap16(x)
#define be32(x) __builtin_bswap32(x)

static void *(*map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*map_update)(void *map, const void *key, const void *value,
			  __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*map_delete)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static __u64 (*coarse_time)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;
static __u32 (*random32)(void) = (void *)BPF_FUNC_get_prandom_u32;
static long (*redirect)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect;
static long (*redirect_peer)(__u32 ifindex, __u64 flags) = (void *)BPF_FUNC_redirect_peer;
static long (*adjust_room)(struct __sk_buff *skb, __s32 length, __u32 mode,
			   __u64 flags) = (void *)BPF_FUNC_skb_adjust_room;
static long (*fib_lookup)(void *context, struct bpf_fib_lookup *parameters, int size,
			  __u32 flags) = (void *)BPF_FUNC_fib_lookup;
static long (*pull_data)(struct __sk_buff *skb, __u32 length) = (void *)BPF_FUNC_skb_pull_data;
static long (*change_tail)(struct __sk_buff *skb, __u32 length, __u64 flags) = (void *)BPF_FUNC_skb_change_tail;
static long (*change_type)(struct __sk_buff *skb, __u32 type) = (void *)BPF_FUNC_skb_change_type;
static long (*set_hash)(struct __sk_buff *skb, __u32 hash) = (void *)BPF_FUNC_set_hash;
static __u32 (*get_hash)(struct __sk_buff *skb) = (void *)BPF_FUNC_get_hash_recalc;
static long (*csum_level)(struct __sk_buff *skb, __u64 level) = (void *)BPF_FUNC_csum_level;

/* Flags of adjust_room from Linux 6.3 on: what is taken off is an outer header, and this is behind it. */
#define ADJ_ROOM_DECAP_L3_IPV6 (1ULL << 8)

/* Of linux/if_ether.h, linux/in.h and linux/socket.h. */
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define FAMILY_IPV4 2
#define FAMILY_IPV6 10
/* What linux/if_packet.h calls PACKET_HOST: a frame to the MAC address of the device. */
#define FOR_THIS_HOST 0
/* PACKET_OTHERHOST: a frame to the MAC address of another one, which a bridge passes on. */
#define FOR_ANOTHER_HOST 3

/* "Go on with what comes after this program": TCX_NEXT, and TC_ACT_UNSPEC at clsact. */
#define NEXT (-1)

#endif
