// A process that runs a Helia node: a JSON command per line in, an answer per line out, {"error": "..."} when it failed.
// On one loopback port: TCP, Noise, Yamux, identify and ping; no other peers, no discovery, no routing, no gateways.
import { createReadStream, createWriteStream } from 'node:fs'
import { createInterface } from 'node:readline'
import { pipeline } from 'node:stream/promises'

import { withBitswap } from '@helia/bitswap'
import { withLibp2pLight } from '@helia/libp2p'
import { unixfs } from '@helia/unixfs'
import * as dagCbor from '@ipld/dag-cbor'
import { identify } from '@libp2p/identify'
import { noise } from '@libp2p/noise'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { yamux } from '@libp2p/yamux'
import { multiaddr } from '@multiformats/multiaddr'
import { createHeliaLight } from 'helia'
import { fixedSize } from 'ipfs-unixfs-importer/chunker'
import { balanced } from 'ipfs-unixfs-importer/layout'
import { CID } from 'multiformats/cid'

const helia = withBitswap(withLibp2pLight(createHeliaLight({ codecs: [dagCbor] }), {
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() }
}))
await helia.start()
const files = unixfs(helia)

const commands = {
  // A file in the shape that our nodes give theirs.
  add: async (path) => String(await files.addByteStream(createReadStream(path, { highWaterMark: 1 << 20 }), {
    cidVersion: 1,
    rawLeaves: true,
    chunker: fixedSize({ chunkSize: 1 << 20 }),
    layout: balanced({ maxChildrenPerNode: 174 })
  })),
  // A file in the shape that Helia gives by default.
  add_default: async (path) => String(await files.addByteStream(createReadStream(path))),
  get: async (cid, path) => { await pipeline(files.cat(CID.parse(cid)), createWriteStream(path)); return 0 },
  // Fetches and keeps everything that can be reached from this block; the number of blocks.
  pin: async (cid) => {
    let blocks = 0
    for await (const _ of helia.pins.add(CID.parse(cid))) { blocks += 1 }
    return blocks
  },
  connect: async (address) => { await helia.libp2p.dial(multiaddr(address)); return 0 },
  peers: async () => helia.libp2p.getPeers().map(String)
}

console.log(JSON.stringify(helia.libp2p.getMultiaddrs().map(String)))
for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...rest] = JSON.parse(line)
  try {
    console.log(JSON.stringify(await commands[name](...rest)))
  } catch (error) {
    console.log(JSON.stringify({ error: String(error) }))
  }
}
process.exit(0)
